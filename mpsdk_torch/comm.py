"""Collectives with gradients for tensor parallelism, and point-to-point calls for the pipeline.

The conjugate pairs are those of Megatron-LM (Shoeybi et al. 2019, arXiv:1909.08053, figure 3) and of its sequence
parallelism (Korthikanti et al. 2022, arXiv:2205.05198, figure 5): each forward's collective has the other as backward.

| function                                 | forward                      | backward                     |
|------------------------------------------|------------------------------|------------------------------|
| `enter_parallel`                         | identity                     | all-reduce                   |
| `leave_parallel`                         | all-reduce                   | identity                     |
| `enter_parallel`, under sequence parallel | all-gather, dimension 1     | reduce-scatter, dimension 1  |
| `leave_parallel`, under sequence parallel | reduce-scatter, dimension 1 | all-gather, dimension 1      |
| `gather_features`                        | all-gather, last dimension   | this rank's part             |
| `split_features`                         | this rank's part             | all-gather, last dimension   |

The gathered sequence is what a cut layer keeps for its weight gradient; Korthikanti et al. keep this rank's part and gather
it again in the backward.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

# torch 2.13 renames these two and warns of the old names; 2.11 has only the old.
_RENAMED = hasattr(dist, "all_gather_single")
_all_gather = dist.all_gather_single if _RENAMED else dist.all_gather_into_tensor
_reduce_scatter = dist.reduce_scatter_single if _RENAMED else dist.reduce_scatter_tensor


@dataclass(frozen=True)
class TensorGroup:
    """The ranks that share one layer's matrices. `handle` is None when there is only one."""

    handle: dist.ProcessGroup | None = None
    rank: int = 0
    size: int = 1
    sequence_parallel: bool = False


class _CopyToGroup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        gradient = gradient.contiguous().clone()  # autograd may share the buffer with another branch
        dist.all_reduce(gradient, group=ctx.group)
        return gradient, None


class _ReduceFromGroup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
        tensor = tensor.contiguous().clone()  # selective recompute may keep the product itself
        dist.all_reduce(tensor, group=group)
        return tensor

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class _GatherSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: TensorGroup) -> Tensor:
        ctx.group = group
        return _all_gather_sequence(tensor, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _reduce_scatter_sequence(gradient, ctx.group), None


class _ScatterSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: TensorGroup) -> Tensor:
        ctx.group = group
        return _reduce_scatter_sequence(tensor, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _all_gather_sequence(gradient, ctx.group), None


class _GatherFeatures(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: TensorGroup) -> Tensor:
        ctx.group = group
        return _all_gather_features(tensor, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient.chunk(ctx.group.size, -1)[ctx.group.rank], None


class _SplitFeatures(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: TensorGroup) -> Tensor:
        ctx.group = group
        return tensor.chunk(group.size, -1)[group.rank].clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _all_gather_features(gradient, ctx.group), None


def _all_gather_features(tensor: Tensor, group: TensorGroup) -> Tensor:
    """(..., part) on each rank to (..., part * size) on all."""
    gathered = tensor.new_empty((group.size, *tensor.shape))
    _all_gather(gathered.flatten(0, 1), tensor.contiguous(), group=group.handle)
    return torch.cat(gathered.unbind(0), dim=-1)


def _all_gather_sequence(tensor: Tensor, group: TensorGroup) -> Tensor:
    """(batch, part, ...) on each rank to (batch, part * size, ...) on all."""
    gathered = tensor.new_empty((group.size, *tensor.shape))
    _all_gather(gathered.flatten(0, 1), tensor.contiguous(), group=group.handle)
    return gathered.transpose(0, 1).flatten(1, 2)


def _reduce_scatter_sequence(tensor: Tensor, group: TensorGroup) -> Tensor:
    """(batch, length, ...) on each rank, summed, to (batch, length / size, ...) of it on each."""
    parts = tensor.unflatten(1, (group.size, -1)).transpose(0, 1).contiguous()
    own = torch.empty_like(parts[0])
    _reduce_scatter(own, parts.flatten(0, 1), group=group.handle)
    return own


def enter_parallel(hidden: Tensor, group: TensorGroup) -> Tensor:
    """Hidden states as a column-parallel layer needs them: the whole sequence, gradients summed over the group."""
    if group.handle is None:
        return hidden
    if group.sequence_parallel:
        return _GatherSequence.apply(hidden, group)
    return _CopyToGroup.apply(hidden, group.handle)


def leave_parallel(partial: Tensor, group: TensorGroup) -> Tensor:
    """Partial sums of a row-parallel layer, summed: whole, or this rank's part of the sequence."""
    if group.handle is None:
        return partial
    if group.sequence_parallel:
        return _ScatterSequence.apply(partial, group)
    return _ReduceFromGroup.apply(partial, group.handle)


def gather_features(part: Tensor, group: TensorGroup) -> Tensor:
    """(..., features / t) of each rank to all features on all, which go on to do the same with them."""
    return part if group.handle is None else _GatherFeatures.apply(part, group)


def split_features(whole: Tensor, group: TensorGroup) -> Tensor:
    """This rank's part (..., features / t) of features that all ranks have."""
    return whole if group.handle is None else _SplitFeatures.apply(whole, group)


class Route(NamedTuple):
    """What travels between two pipeline coordinates (activations, or gradients), and whether up or down the ranks."""

    forward: bool
    ascending: bool


class StageLinks:
    """Point-to-point calls between the pipeline ranks of one line.

    Every route has a process group of its own. Under NCCL the transfers between two ranks of a group run in the order in
    which they were issued, so a send that waits for its receiver holds back what shares its group: on a route of its own
    that is only what must follow it anyway.

    Args:
        ranks: the rank at each pipeline coordinate.
        groups: of each route that the schedule uses; every rank of the line is in each.
    """

    def __init__(self, ranks: tuple[int, ...], groups: Mapping[Route, dist.ProcessGroup]) -> None:
        self._ranks, self._groups = ranks, groups
        self._pending: list[tuple[dist.Work, Tensor]] = []

    def send(self, tensor: Tensor, source: int, target: int, *, forward: bool, tag: int) -> None:
        """Start sending `tensor` from pipeline coordinate `source`, which is here; it is kept until it has gone."""
        tensor = tensor.contiguous()
        group = self._groups[Route(forward, target > source)]
        work = dist.isend(tensor, self._ranks[target], group=group, tag=tag)
        self._pending = [(old, kept) for old, kept in self._pending if not old.is_completed()]
        if work is not None:
            self._pending.append((work, tensor))

    def receive(self, into: Tensor, source: int, target: int, *, forward: bool, tag: int) -> dist.Work | None:
        """Start receiving from pipeline coordinate `source` at `target`, which is here."""
        group = self._groups[Route(forward, target > source)]
        return dist.irecv(into, self._ranks[source], group=group, tag=tag)

    def finish(self) -> None:
        """Wait until everything sent has gone."""
        for work, _ in self._pending:
            work.wait()
        self._pending.clear()
