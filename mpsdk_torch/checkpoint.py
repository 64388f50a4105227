"""Between this rank's parameters and the core's checkpoint: which slices of the canonical tensors lie here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mpsdk.backend import GOOD_STEPS, LOSS_SCALE, OPTIMIZER_STEP, WEIGHT, RankState, Shard, TensorSource
from mpsdk_torch.optimizer import STEP, ShardedOptimizer
from mpsdk_torch.parameters import Held


def rank_state(optimizer: ShardedOptimizer, *, writes: bool) -> RankState:
    """What this rank adds to a checkpoint. `writes` is False on replicas, whose twin writes the same."""
    shards = list(_shards(optimizer)) if writes else []
    return RankState(shards, _scalars(optimizer))


def _shards(optimizer: ShardedOptimizer) -> Iterator[Shard]:
    for item in optimizer.held:
        offset, shape = item.canonical_slice
        if not item.planned.owned or 0 in shape:
            continue
        tensors = {WEIGHT: item.local}
        tensors |= {slot: optimizer.state[item.name][name] for slot, name in optimizer.slots.items()}
        for slot, tensor in tensors.items():
            yield Shard(
                name=item.planned.name,
                slot=slot,
                global_shape=item.planned.tensor.shape,
                offset=offset,
                shape=shape,
                read=lambda tensor=tensor, shape=shape: _to_numpy(_valid(tensor, shape)),
            )


def _scalars(optimizer: ShardedOptimizer) -> dict[str, float | int]:
    scalars: dict[str, float | int] = {}
    counters = [state[STEP] for state in optimizer.state.values() if STEP in state]
    if counters:  # every parameter has stepped as often
        scalars[OPTIMIZER_STEP] = int(counters[0])
    if optimizer.loss_scale.active:
        scalars[LOSS_SCALE] = float(optimizer.loss_scale.scale)
        scalars[GOOD_STEPS] = int(optimizer.loss_scale.good_steps)
    return scalars


@torch.no_grad()
def fill_weights(held: Sequence[Held], source: TensorSource) -> None:
    """Read this rank's slice of every weight; padding rows become zeros."""
    for item in held:
        _fill(item, item.local, source, WEIGHT)


@torch.no_grad()
def fill_optimizer(optimizer: ShardedOptimizer, source: TensorSource) -> None:
    """Read the optimizer's slots and scalars, as far as the source has them."""
    for item in optimizer.held:
        state = optimizer.state.get(item.name, {})
        for slot, name in optimizer.slots.items():
            if name in state and slot in source.slots:
                _fill(item, state[name], source, slot)
        if STEP in state and OPTIMIZER_STEP in source.scalars:
            state[STEP].fill_(float(source.scalars[OPTIMIZER_STEP]))
    scale = optimizer.loss_scale
    if scale.active and LOSS_SCALE in source.scalars:
        scale.scale.fill_(float(source.scalars[LOSS_SCALE]))
        scale.good_steps.fill_(int(source.scalars[GOOD_STEPS]))


def _fill(item: Held, into: Tensor, source: TensorSource, slot: str) -> None:
    offset, shape = item.canonical_slice
    into.zero_()
    if 0 in shape:
        return
    name = item.planned.tensor.tied_to or item.planned.name
    values = source.read(name, slot, offset, shape)
    _valid(into, shape).copy_(torch.from_numpy(np.ascontiguousarray(values)))


def _valid(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    return tensor[: shape[0]] if tensor.shape != shape else tensor


def _to_numpy(tensor: Tensor) -> NDArray[np.float32]:
    return tensor.detach().to("cpu", torch.float32, copy=True).numpy()
