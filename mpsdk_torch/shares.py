"""Each rank's share of a whole model's parameters: from its own copy, or from rank 0's."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mpsdk_torch.comm import TensorGroup
from mpsdk_torch.layout import device
from mpsdk_torch.nn.planned import cut_evenly


class Cut(NamedTuple):
    """How a parameter is cut: along `dimension` (None: not at all), in each of `packed` tensors that it joins."""

    dimension: int | None = None
    packed: int = 1


WHOLE = Cut()


class Shares:
    """Gives each parameter's share once, so that tied parameters stay one.

    Args:
        group: the tensor-parallel ranks, which ask for the same parameters in the same order.
        from_rank0: rank 0 has the values; its group gets shares, and all other ranks parameters on the meta device. False: each
            rank cuts its own, and what is on the meta device stays there.
    """

    def __init__(self, group: TensorGroup, *, from_rank0: bool) -> None:
        self._group, self._from_rank0 = group, from_rank0
        rank = dist.get_rank() if dist.is_initialized() else 0
        ranks = [rank] if group.handle is None else dist.get_process_group_ranks(group.handle)
        self._gives, self._gets = rank == 0, 0 in ranks
        self._made: dict[nn.Parameter, nn.Parameter] = {}

    def share(self, parameter: Tensor, cut: Cut) -> nn.Parameter:
        """This rank's share, with the dtype of the whole; the parameter itself where nothing is to be done."""
        assert isinstance(parameter, nn.Parameter)
        if parameter not in self._made:
            whole = parameter.detach()
            values = self._values(whole, cut)
            share = parameter
            if values is not whole:
                share = nn.Parameter(values, requires_grad=parameter.requires_grad)
            self._made[parameter] = share
        return self._made[parameter]

    def buffer(self, buffer: Tensor) -> Tensor:
        """A buffer of rank 0 on the ranks that get shares; each other rank's own, which it has made as rank 0 did."""
        return self._values(buffer, WHOLE) if self._gets else buffer

    @torch.no_grad()
    def _values(self, whole: Tensor, cut: Cut) -> Tensor:
        group, shape = self._group, list(whole.shape)
        if cut.dimension is not None:
            shape[cut.dimension] //= group.size
        if self._from_rank0 and not self._gets:
            return whole.new_empty(shape, device="meta")
        if group.handle is None:
            return whole
        if not self._from_rank0:
            if cut.dimension is None:
                return whole
            if whole.is_meta:
                return whole.new_empty(shape)
            return cut_evenly(whole, cut.dimension, cut.packed, group.size)[group.rank]
        own = torch.empty(shape, dtype=whole.dtype, device=device())
        parts = None
        if self._gives:
            there = whole.to(own.device)
            parts = [there.contiguous()] * group.size
            if cut.dimension is not None:
                parts = [
                    part.contiguous() for part in cut_evenly(there, cut.dimension, cut.packed, group.size)
                ]
        dist.scatter(own, parts, src=0, group=group.handle)
        return own
