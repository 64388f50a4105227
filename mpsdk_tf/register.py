"""Parallel twins: which class stands in for a Keras layer under tensor parallelism, and how calls of one become calls of the
other.

    @tp_register(ParallelMixer, init_hook=lambda layer: ((layer.width,), {}))
    class Mixer(keras.layers.Layer): ...

A twin makes its weights at the size of this rank's part: `tensor_group()` is the group. They have the names of the layer's
own, and `cuts` says along which dimension each is cut; what it does not name is whole. So the plan knows every part before
anything runs, and a checkpoint holds the layer's own weights, whatever the layout.

`mpsdk_tf.nn.planned` has the twins of Keras' own layers. Without a word every layer with a twin is cut; where something is
marked to be cut, only that is.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple, TypeVar

import keras

from mpsdk.errors import ConfigError, Problem
from mpsdk.signatures import other_signature
from mpsdk_tf.nn.planned import OWN_TWINS
from mpsdk_tf.twins import Hook, Twin

Kind = TypeVar("Kind", bound=type[keras.layers.Layer])
_MARK = "_mpsdk_tensor_parallel"


class Mark(NamedTuple):
    """Whether a layer is to be cut, and arguments of its twin that override those of the init hook."""

    enabled: bool
    settings: Mapping[str, Any]


_twins: dict[type[keras.layers.Layer], Twin] = dict(OWN_TWINS)
_marks: ContextVar[tuple[Mark, ...]] = ContextVar("marks", default=())
_marking = threading.Lock()
_marks_new_layers = False


def tp_register(
    dist_module: type[keras.layers.Layer],
    init_hook: Hook | None = None,
    forward_hook: Hook | None = None,
    return_hook: Hook | None = None,
) -> Callable[[Kind], Kind]:
    """A class decorator: `dist_module` takes the place of the class under tensor parallelism.

    Args:
        dist_module: a Keras layer, see this module. It is built with the shapes that the layer was built with, unless it
            makes its weights when it is made.
        init_hook: takes the layer, which is built, and gives (args, kwargs) for `dist_module`; or None, to keep this layer
            whole. None: the layer's `get_config()` as keyword arguments.
        forward_hook: takes the arguments of the class's `call`, and gives (args, kwargs) for `dist_module`'s.
        return_hook: takes what `dist_module` gives, and gives what the class does.

    A forward hook has the signature of `call`, without self, or takes `*args, **kwargs`.

    Raises:
        ConfigError: the class has a twin already, or a hook's signature is another; both in one error.
    """

    def register(module_cls: Kind) -> Kind:
        tp_register_with_module(module_cls, dist_module, init_hook, forward_hook, return_hook)
        return module_cls

    return register


def tp_register_with_module(
    module_cls: type[keras.layers.Layer],
    dist_module: type[keras.layers.Layer],
    init_hook: Hook | None = None,
    forward_hook: Hook | None = None,
    return_hook: Hook | None = None,
) -> None:
    """`tp_register` for a class that is somebody else's."""
    problems = list(other_signature("forward_hook", forward_hook, module_cls.call))
    if module_cls in _twins:
        remedy = f"has a twin already, {_twins[module_cls].dist_module.__name__}; register a class once"
        problems.append(Problem("module_cls", module_cls.__name__, remedy))
    if problems:
        raise ConfigError(problems, where=f"the twin of {module_cls.__name__}")
    _twins[module_cls] = Twin(dist_module, init_hook, forward_hook, return_hook)


@contextmanager
def tensor_parallelism(enabled: bool = True, **settings: Any) -> Iterator[None]:
    """Within, or in a function decorated with it, layers are made to be cut; inside of one another the innermost counts.
    `settings` override arguments that init hooks give.
    """
    _mark_new_layers()
    token = _marks.set((*_marks.get(), Mark(enabled, settings)))
    try:
        yield
    finally:
        _marks.reset(token)


def _mark_new_layers() -> None:
    """Have Keras' layers remember under which mark they were made. Keras has no place to ask for this."""
    global _marks_new_layers
    with _marking:
        if _marks_new_layers:
            return
        make = keras.layers.Layer.__new__

        def new(cls: type[keras.layers.Layer], *args: Any, **kwargs: Any) -> keras.layers.Layer:
            layer = make(cls, *args, **kwargs)
            if marks := _marks.get():
                layer.__dict__[_MARK] = marks[-1]
            return layer

        keras.layers.Layer.__new__ = staticmethod(new)  # type: ignore[method-assign]
        _marks_new_layers = True


def set_tensor_parallelism(layer: keras.layers.Layer, enabled: bool = True, **settings: Any) -> None:
    """`tensor_parallelism` for a layer or a model that exists, and all layers in it."""
    for inner in layer._flatten_layers(include_self=True, recursive=True):
        inner.__dict__[_MARK] = Mark(enabled, settings)


def mark_of(layer: keras.layers.Layer) -> Mark | None:
    """What was said of a layer; None: nothing."""
    return layer.__dict__.get(_MARK)


def twin_of(layer: keras.layers.Layer) -> Twin | None:
    """What stands in for a layer of its very class."""
    return _twins.get(type(layer))
