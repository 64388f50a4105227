"""torch's own pipeline schedule class, over mpsdk's layers and over transformers'.

With mpsdk's layers only the execution of the schedule differs from mpsdk; with transformers' it is what a person would
write. Either way the model is cut where mpsdk's plan cuts it, and the tied embedding's two gradients are summed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B

from benchmarks.contenders import Seat
from benchmarks.contenders.loops import adamw, join, load
from benchmarks.contenders.planned import plan_of
from benchmarks.sizes import MAX_GRAD_NORM
from mpsdk.backend import WEIGHT
from mpsdk.families.hf import HuggingFaceSource
from mpsdk_torch.comm import TensorGroup
from mpsdk_torch.loss import cross_entropy_sum
from mpsdk_torch.transformer import Transformer

TIED = ("embedding.tokens.weight", "head.output.weight")
Loss = Callable[[Tensor, Tensor], Tensor]


class Pipelined:
    """1F1B over two stages, one on each rank. `tied`: this stage's copy of the token embedding."""

    def __init__(
        self, seat: Seat, stage: nn.Module, loss: Loss, *, tied: nn.Parameter, microbatches: int
    ) -> None:
        self.seat, self.module, self.tied = seat, stage, tied
        device = torch.device("cpu")
        pipeline = PipelineStage(stage, seat.rank, seat.world_size, device)
        self.schedule = Schedule1F1B(pipeline, microbatches, loss_fn=loss, scale_grads=True)
        self.optimizer = adamw(stage)
        self.losses: list[Tensor] = []

    def step(self, step: int) -> None:
        ids, labels = (torch.from_numpy(rows) for rows in self.seat.size.rows(step))
        self.losses = []
        if self.seat.rank == 0:
            self.schedule.step(ids)
        else:
            self.schedule.step(target=labels, losses=self.losses)
        assert self.tied.grad is not None
        dist.all_reduce(self.tied.grad)
        self._clip()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _clip(self) -> None:
        """The tied gradient counts once."""
        counted = [
            p.grad
            for p in self.module.parameters()
            if p.grad is not None and not (self.seat.rank and p is self.tied)
        ]
        square = nn.utils.get_total_norm(counted).square()
        dist.all_reduce(square)
        nn.utils.clip_grads_with_norm_(self.module.parameters(), MAX_GRAD_NORM, square.sqrt())

    def loss(self) -> float:
        total = torch.stack(self.losses).mean().detach() if self.losses else torch.zeros(())
        dist.all_reduce(total)
        return float(total)


def same_layers(seat: Seat) -> Pipelined:
    """mpsdk's stages and loss, run by torch's schedule."""
    join(seat)
    plan, read = plan_of(seat, "torch")
    assert read.directory is not None and plan.description.vocab_size is not None
    vocab_size = plan.description.vocab_size
    source = HuggingFaceSource(read.directory, read.family, read.spec)
    first, last = seat.rank == 0, seat.rank == seat.world_size - 1
    stage = Transformer(read.spec, blocks=plan.stages[seat.rank], first=first, last=last)
    with torch.no_grad():
        for name, parameter in stage.named_parameters():
            values = source.read(name, WEIGHT, (0,) * parameter.ndim, tuple(parameter.shape))
            parameter.copy_(torch.from_numpy(values))

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        return cross_entropy_sum(logits, labels, vocab_size=vocab_size, group=TensorGroup()) / math.prod(
            labels.shape
        )

    (tied,) = (parameter for name, parameter in stage.named_parameters() if name in TIED)
    return Pipelined(seat, stage, loss, tied=tied, microbatches=plan.microbatches)


def transformers(seat: Seat) -> Pipelined:
    """transformers' GPT-2 cut by hand."""
    join(seat)
    plan, _ = plan_of(seat, "torch")
    stage = _Gpt2Stage(load(seat), plan.stages[seat.rank], first=seat.rank == 0)
    tied = stage.ends["tokens"].get_parameter("weight")
    return Pipelined(seat, stage, _cross_entropy, tied=tied, microbatches=plan.microbatches)


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())


class _Gpt2Stage(nn.Module):
    def __init__(self, model: Any, blocks: tuple[int, int], *, first: bool) -> None:
        super().__init__()
        body = model.transformer
        self.blocks = nn.ModuleList(body.h[slice(*blocks)])
        ends: Mapping[str, nn.Module] = (
            {"tokens": body.wte, "positions": body.wpe}
            if first
            else {"norm": body.ln_f, "tokens": model.lm_head}
        )
        self.first, self.ends = first, nn.ModuleDict(ends)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = inputs
        if self.first:
            hidden = self.ends["tokens"](inputs) + self.ends["positions"](torch.arange(inputs.shape[1]))
        for block in self.blocks:
            output = block(hidden)
            hidden = output[0] if isinstance(output, tuple) else output
        return hidden if self.first else self.ends["tokens"](self.ends["norm"](hidden))
