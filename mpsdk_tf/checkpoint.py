"""Between this rank's parameters and the core's checkpoint: which slices of the canonical tensors lie here."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from mpsdk.backend import GOOD_STEPS, LOSS_SCALE, OPTIMIZER_STEP, WEIGHT, RankState, Shard, TensorSource
from mpsdk_tf.optimizer import ShardedOptimizer
from mpsdk_tf.parameters import Held
from mpsdk_tf.tensor import Tensor

_BYTES_AT_ONCE = 2 << 20


def rank_state(optimizer: ShardedOptimizer, *, writes: bool) -> RankState:
    """What this rank adds to a checkpoint. `writes` is False on replicas, whose twin writes the same."""
    shards = list(_shards(optimizer)) if writes else []
    return RankState(shards, _scalars(optimizer))


def _shards(optimizer: ShardedOptimizer) -> Iterator[Shard]:
    for item in optimizer.held:
        offset, shape = item.canonical_slice
        if not item.planned.owned or 0 in shape:
            continue
        for slot, variable in {WEIGHT: item.local, **optimizer.state.get(item.name, {})}.items():
            yield Shard(
                name=item.planned.name,
                slot=slot,
                global_shape=item.planned.tensor.shape,
                offset=offset,
                shape=shape,
                read=lambda variable=variable, rows=shape[0]: to_numpy(variable)[:rows],
            )


def _scalars(optimizer: ShardedOptimizer) -> dict[str, float | int]:
    scalars: dict[str, float | int] = {}
    if optimizer.training.optimizer == "adamw":
        scalars[OPTIMIZER_STEP] = int(optimizer.steps.numpy())
    if optimizer.loss_scale.active:
        scalars[LOSS_SCALE] = float(optimizer.loss_scale.scale.numpy())
        scalars[GOOD_STEPS] = int(optimizer.loss_scale.good_steps.numpy())
    return scalars


def fill_weights(held: Sequence[Held], source: TensorSource) -> None:
    """Read this rank's slice of every weight; padding rows become zeros."""
    for item in held:
        _fill(item, item.local, source, WEIGHT)


def fill_optimizer(optimizer: ShardedOptimizer, source: TensorSource) -> None:
    """Read the optimizer's slots and scalars, as far as the source has them."""
    for item in optimizer.held:
        for slot, variable in optimizer.state.get(item.name, {}).items():
            if slot in source.slots:
                _fill(item, variable, source, slot)
    if OPTIMIZER_STEP in source.scalars:
        optimizer.steps.assign(int(source.scalars[OPTIMIZER_STEP]))
    scale = optimizer.loss_scale
    if scale.active and LOSS_SCALE in source.scalars:
        scale.scale.assign(float(source.scalars[LOSS_SCALE]))
        scale.good_steps.assign(int(source.scalars[GOOD_STEPS]))


def _fill(item: Held, into: Tensor, source: TensorSource, slot: str) -> None:
    """Some rows at a time, then all at once: TensorFlow copies twice what it takes from numpy."""
    offset, shape = item.canonical_slice
    if into.shape[0] == 0:  # a rank may hold no row
        return
    name = item.planned.tensor.tied_to or item.planned.name
    rows, rest = (0 if 0 in shape else shape[0]), tuple(into.shape[1:])
    at_once = max(1, _BYTES_AT_ONCE // (4 * math.prod(rest)))
    blocks: list[Tensor] = []
    for start in range(0, rows, at_once):
        size = (min(at_once, rows - start), *rest)
        blocks.append(tf.constant(source.read(name, slot, (offset[0] + start, *offset[1:]), size)))
    if rows < into.shape[0]:
        blocks.append(tf.zeros((into.shape[0] - rows, *rest)))
    into.assign(tf.concat(blocks, axis=0) if len(blocks) > 1 else blocks[0])


def to_numpy(variable: Tensor) -> NDArray[np.float32]:
    return np.array(variable.numpy(), np.float32)
