"""What a parallel twin of a Keras layer is. See `mpsdk_tf.register`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol

import keras

from mpsdk_tf.comm import TensorGroup

Hook = Callable[..., Any]


class ParallelTwin(Protocol):
    """What a twin has beside what every Keras layer has."""

    cuts: Mapping[str, int]
    """By a weight's path in the layer ("kernel", "up/bias"), the dimension that is cut into the ranks' parts."""

    draws_apart: tuple[str, ...]
    """May be left out: layers within it, by attribute, whose random numbers are others on each rank, since they work on its
    part. The rest draws the same on all ranks."""


@dataclass(frozen=True)
class Twin:
    """A registration, see `mpsdk_tf.register.tp_register`. `can_end`: `dist_module` has a setting `ends`: its result is the
    model's logits, which may stay cut."""

    dist_module: type[keras.layers.Layer]
    init_hook: Hook | None
    forward_hook: Hook | None = None
    return_hook: Hook | None = None
    can_end: bool = False


_group: ContextVar[TensorGroup] = ContextVar("group")


def tensor_group() -> TensorGroup:
    """The tensor-parallel ranks that a twin makes itself for."""
    return _group.get(TensorGroup())


@contextmanager
def making_for(group: TensorGroup) -> Iterator[None]:
    """Within, twins make themselves for `group`."""
    token = _group.set(group)
    try:
        yield
    finally:
        _group.reset(token)
