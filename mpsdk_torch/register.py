"""Parallel twins: which class stands in for a module under tensor parallelism, and how calls of one become calls of the other.

    @tp_register(ParallelMixer, init_hook=lambda width, depth=2: ((width,), {"layers": depth}))
    class Mixer(nn.Module): ...

    with tensor_parallelism():
        model = Model()  # has a Mixer somewhere inside
    model = parallelize_model(model, {"tensor_parallel": 2})

nn.Linear and nn.Embedding have twins already, for models without a plan of their own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from mpsdk.errors import ConfigError, Problem
from mpsdk.signatures import other_signature
from mpsdk_torch.comm import TensorGroup
from mpsdk_torch.nn.planned import cut_evenly

Hook = Callable[..., Any]
Kind = TypeVar("Kind", bound=type[nn.Module])
_MADE, _MARK = "_mpsdk_made", "_mpsdk_tensor_parallel"


@dataclass(frozen=True)
class Twin:
    """A registration: see `tp_register`."""

    dist_module: type[nn.Module]
    init_hook: Hook | None
    forward_hook: Hook | None
    return_hook: Hook | None


@dataclass(frozen=True)
class Mark:
    """Whether a module is to be cut, and arguments of its twin that override those of the init hook."""

    enabled: bool
    settings: Mapping[str, Any]


_twins: dict[type[nn.Module], Twin] = {}
_marks: list[Mark] = []


def tp_register(
    dist_module: type[nn.Module],
    init_hook: Hook | None = None,
    forward_hook: Hook | None = None,
    return_hook: Hook | None = None,
) -> Callable[[Kind], Kind]:
    """A class decorator: `dist_module` takes the place of the class under tensor parallelism.

    Args:
        dist_module: makes itself at this rank's size; `mpsdk_torch.layout.tensor_group()` is the group.
        init_hook: takes the arguments of the class's `__init__`, and gives (args, kwargs) for `dist_module`'s; or None, to keep
            this module whole. None: both take the same.
        forward_hook: takes the arguments of the class's `forward`, and gives (args, kwargs) for `dist_module`'s.
        return_hook: takes what `dist_module`'s forward gives, and gives what the class's does.

    Hooks have the signatures of the methods that they translate, without self, or take `*args, **kwargs`.

    Weights are taken over: a parameter of the twin has the values of the one of the same name, its share of them where one
    dimension is 1/t of the original's. A twin that arranges them otherwise has a method `load_whole(original)`.

    Raises:
        ConfigError: the class has a twin already, or a hook's signature is another; both in one error.
    """

    def register(module_cls: Kind) -> Kind:
        tp_register_with_module(module_cls, dist_module, init_hook, forward_hook, return_hook)
        return module_cls

    return register


def tp_register_with_module(
    module_cls: type[nn.Module],
    dist_module: type[nn.Module],
    init_hook: Hook | None = None,
    forward_hook: Hook | None = None,
    return_hook: Hook | None = None,
) -> None:
    """`tp_register` for a class that is somebody else's. Modules made before are not cut: register first."""
    problems = [
        *other_signature("init_hook", init_hook, module_cls.__init__),
        *other_signature("forward_hook", forward_hook, module_cls.forward),
    ]
    if module_cls in _twins:
        remedy = f"has a twin already, {_twins[module_cls].dist_module.__name__}; register a class once"
        problems.append(Problem("module_cls", module_cls.__name__, remedy))
    if problems:
        raise ConfigError(problems, where=f"the twin of {module_cls.__name__}")
    _twins[module_cls] = Twin(dist_module, init_hook, forward_hook, return_hook)
    _record_arguments(module_cls)


def _record_arguments(module_cls: type[nn.Module]) -> None:
    """Have instances remember what they were made with: their twin is made from it."""
    original = module_cls.__init__

    @functools.wraps(original)
    def init(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        if type(self) is module_cls:
            self.__dict__[_MADE] = (args, kwargs)
            if _marks:
                self.__dict__[_MARK] = _marks[-1]
        original(self, *args, **kwargs)

    module_cls.__init__ = init  # type: ignore[method-assign]


@contextmanager
def tensor_parallelism(enabled: bool = True, **settings: Any) -> Iterator[None]:
    """Within, or in a function decorated with it, modules are made to be cut by `parallelize_model`; inside of one another the
    innermost counts. `settings` override arguments that init hooks give. Nothing is cut yet.
    """
    _marks.append(Mark(enabled, settings))
    handle = register_module_module_registration_hook(_mark)
    try:
        yield
    finally:
        handle.remove()
        _marks.pop()


def _mark(parent: nn.Module, name: str, module: nn.Module | None) -> None:
    if module is not None:
        module.__dict__.setdefault(_MARK, _marks[-1])


def set_tensor_parallelism(module: nn.Module, enabled: bool = True, **settings: Any) -> None:
    """`tensor_parallelism` for a module that exists, and all that are in it."""
    for inner in module.modules():
        inner.__dict__[_MARK] = Mark(enabled, settings)


def mark_of(module: nn.Module) -> Mark | None:
    """What was said of a module; None: nothing."""
    return module.__dict__.get(_MARK)


def marked(model: nn.Module) -> Iterator[tuple[str, nn.Module, Twin | None]]:
    """The outermost modules that are to be cut, with their twin; None: what mpsdk has itself for nn.Linear and nn.Embedding."""
    yield from _marked("", model)


def _marked(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module, Twin | None]]:
    mark = mark_of(module)
    twin = _twins.get(type(module))
    if mark is not None and mark.enabled and name:
        if twin is not None and _arguments(module, twin) is not None:
            yield name, module, twin
            return
        if twin is None and isinstance(module, nn.Linear | nn.Embedding):
            yield name, module, None
            return
    for child, inner in module.named_children():
        yield from _marked(f"{name}.{child}" if name else child, inner)


def _arguments(module: nn.Module, twin: Twin) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """What the twin is made with, None where the init hook leaves the module whole."""
    args, kwargs = module.__dict__.get(_MADE, ((), {}))
    if twin.init_hook is None:
        return args, dict(kwargs)
    given = twin.init_hook(*args, **kwargs)
    return None if given is None else (tuple(given[0]), dict(given[1]))


def problems_of(name: str, module: nn.Module, twin: Twin) -> Iterator[Problem]:
    if _MADE not in module.__dict__:
        remedy = f"was made before {type(module).__name__} got its twin; call tp_register_with_module first"
        yield Problem(name, type(module).__name__, remedy)


def make_twin(name: str, module: nn.Module, twin: Twin, group: TensorGroup) -> nn.Module:
    """The twin of one module, with its weights and its hooks.

    Raises ConfigError for parameters whose values it can't take over.
    """
    arguments, mark = _arguments(module, twin), mark_of(module)
    assert arguments is not None and mark is not None
    args, kwargs = arguments
    made = twin.dist_module(*args, **{**kwargs, **mark.settings})
    load_whole = getattr(made, "load_whole", None)
    if load_whole is not None:
        load_whole(module)
    elif problems := list(_take_over(name, made, module, group)):
        raise ConfigError(problems, where=f"the twin of {type(module).__name__}")
    _translate_calls(made, twin)
    return made.train(module.training)


@torch.no_grad()
def _take_over(name: str, made: nn.Module, original: nn.Module, group: TensorGroup) -> Iterator[Problem]:
    values = {**dict(original.named_parameters()), **dict(original.named_buffers())}
    for leaf, tensor in (*made.named_parameters(), *made.named_buffers()):
        whole = values.pop(leaf, None)
        if whole is None:
            yield Problem(f"{name}.{leaf}", tuple(tensor.shape), _how_to_load(made, "has no namesake"))
            continue
        differing = [d for d, (a, b) in enumerate(zip(tensor.shape, whole.shape, strict=False)) if a != b]
        if tensor.shape == whole.shape:
            tensor.copy_(whole)
        elif (
            tensor.ndim == whole.ndim
            and len(differing) == 1
            and whole.shape[differing[0]] == tensor.shape[differing[0]] * group.size
        ):
            tensor.copy_(cut_evenly(whole, differing[0], 1, group.size)[group.rank])
        else:
            remedy = _how_to_load(made, f"is no share of the original's {tuple(whole.shape)}")
            yield Problem(f"{name}.{leaf}", tuple(tensor.shape), remedy)
    for leaf, tensor in values.items():
        yield Problem(f"{name}.{leaf}", tuple(tensor.shape), _how_to_load(made, "is not in the twin"))


def _how_to_load(made: nn.Module, what: str) -> str:
    return f"{what}; give {type(made).__name__} a method load_whole(original) that takes the weights over"


def _translate_calls(made: nn.Module, twin: Twin) -> None:
    translate, give_back = twin.forward_hook, twin.return_hook
    if translate is not None:

        def before(_: nn.Module, args: Any, kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
            there = translate(*args, **kwargs)
            return tuple(there[0]), dict(there[1])

        made.register_forward_pre_hook(before, with_kwargs=True)
    if give_back is not None:

        def after(_: nn.Module, args: Any, output: Any) -> Any:
            return give_back(output)

        made.register_forward_hook(after)
