"""What a person writes with PyTorch and transformers alone: one process, DDP, FSDP2, and FSDP2 through Accelerate."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch._dynamo  # an optimizer loads it; loaded here, it counts as a library and not as the contender's memory
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM
from transformers.models.gpt2 import modeling_gpt2  # noqa: F401  (loaded early, for the same reason)

from benchmarks.contenders import Seat
from benchmarks.sizes import LEARNING_RATE, MAX_GRAD_NORM, WEIGHT_DECAY

Backward = Callable[[Tensor], None]
Clip = Callable[[Iterable[nn.Parameter], float], object]


def load(seat: Seat) -> Any:
    """transformers' model, with the weights that every contender starts from."""
    return AutoModelForCausalLM.from_pretrained(seat.model, dtype=torch.float32).train()


def join(seat: Seat) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{seat.store}", rank=seat.rank, world_size=seat.world_size
    )


def adamw(model: nn.Module, *, fused: bool | None = True) -> torch.optim.AdamW:
    """Weight decay for matrices only, as mpsdk has it."""
    groups = [
        {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=LEARNING_RATE, fused=fused)


class Loop:
    """The usual five lines: forward, backward, clip, step, clear."""

    def __init__(
        self,
        seat: Seat,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        backward: Backward = Tensor.backward,
        clip: Clip = nn.utils.clip_grad_norm_,
    ) -> None:
        self.seat, self.model, self.optimizer = seat, model, optimizer
        self.backward, self.clip = backward, clip
        self.last = torch.zeros(())

    def step(self, step: int) -> None:
        ids, labels = self.seat.size.rows(step)
        mine = self.seat.share(self.seat.rank, self.seat.world_size)
        labels_here = torch.from_numpy(labels[mine])
        output = self.model(
            input_ids=torch.from_numpy(ids[mine]), labels=labels_here, shift_labels=labels_here
        )
        self.backward(output.loss)
        self.clip(self.model.parameters(), MAX_GRAD_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.last = output.loss.detach()

    def loss(self) -> float:
        if self.seat.world_size > 1:
            dist.all_reduce(self.last)
        return float(self.last) / self.seat.world_size


def plain(seat: Seat) -> Loop:
    """One process, torch's AdamW as it comes."""
    model = load(seat)
    return Loop(seat, model, adamw(model, fused=None))


def plain_fused(seat: Seat) -> Loop:
    """One process, with the fused AdamW that one has to ask for."""
    model = load(seat)
    return Loop(seat, model, adamw(model))


def ddp(seat: Seat) -> Loop:
    join(seat)
    model = DistributedDataParallel(load(seat), gradient_as_bucket_view=True)
    return Loop(seat, model, adamw(model))


def fsdp2(seat: Seat) -> Loop:
    """As PyTorch's tutorial does it: every block a unit, then the root, parameters freed after use."""
    join(seat)
    model = load(seat)
    for block in model.transformer.h:
        fully_shard(block)
    fully_shard(model)
    return Loop(seat, model, adamw(model))
