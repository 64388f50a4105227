"""Replicas of plain fp32 weights: gradients summed over data ranks, unit by unit, while the backward goes on.

A block is a unit, and so are the embedding and the head. When the last backward of a step has made all gradients of a
unit, they are joined into one buffer whose all-reduce starts at once; the parameters' gradients are from then on parts of
that buffer. So nothing is copied back, and only one unit's gradients are there twice at a time.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mpsdk.errors import BackendError
from mpsdk_torch.transformer import Transformer


class ReplicatedReduction:
    """See `mpsdk_torch.executor.Reduction`. `group`: the replicas, or None where there is only one."""

    def __init__(self, stages: Mapping[int, Transformer], group: dist.ProcessGroup | None) -> None:
        self._units = {number: _units(stage, group) for number, stage in stages.items() if group is not None}

    def before_backward(self, stage: int, *, last: bool, complete: bool) -> None:
        for unit in self._units.get(stage, ()):
            unit.expects_all = last and complete

    def after_weight_gradients(self, stage: int, *, last: bool) -> None:
        if last:
            for unit in reversed(self._units.get(stage, ())):
                unit.start()

    def finish(self) -> None:
        for units in self._units.values():
            for unit in units:
                unit.wait()


class _Unit:
    """Parameters whose gradients travel together. `expects_all`: the backward that runs is the step's last."""

    def __init__(self, parameters: list[nn.Parameter], group: dist.ProcessGroup) -> None:
        self.expects_all = False
        self._parameters, self._group = parameters, group
        self._made = 0
        self._work: dist.Work | None = None
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(self._has_gradient)

    def _has_gradient(self, parameter: Tensor) -> None:
        if self.expects_all:
            self._made += 1
            if self._made == len(self._parameters):
                self.start()

    @torch.no_grad()
    def start(self) -> None:
        """Join the gradients and start to sum them."""
        self._made = 0
        gradients = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
        assert len(gradients) == len(self._parameters)
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        sizes = [gradient.numel() for gradient in gradients]
        for parameter, part in zip(self._parameters, flat.split(sizes), strict=True):
            parameter.grad = part.view_as(parameter)
        self._work = dist.all_reduce(flat, group=self._group, async_op=True)

    def wait(self) -> None:
        if self._work is None:
            raise BackendError(
                "gradients were left without their sum over data ranks: a backward did not make all of them"
            )
        self._work.wait()
        self._work = None


def _units(stage: Transformer, group: dist.ProcessGroup) -> list[_Unit]:
    """The embedding, each block, and the head, in the order of the forward; a tied pair is one unit."""
    blocks: list[list[nn.Module]] = [[block] for block in stage.blocks.values()]
    embedding: list[nn.Module] = [] if stage.embedding is None else [stage.embedding]
    head: list[nn.Module] = [] if stage.head is None else [stage.head]
    parts = [embedding + head, *blocks] if stage.tied_here else [embedding, *blocks, head]
    return [_Unit([p for module in part for p in module.parameters()], group) for part in parts if part]
