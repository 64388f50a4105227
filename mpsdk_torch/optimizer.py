"""The optimizer on this rank's shards: tied and split gradients summed, the global norm, clipping, and the update.

The update runs torch's own fused AdamW or SGD on plain local tensors. Clipping and the loss scale go into the fused
kernel as its gradient divisor, and an overflowed step is skipped by it, so nothing is read back from the device.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mpsdk.config import Training
from mpsdk.errors import BackendError
from mpsdk_torch.parameters import Held
from mpsdk_torch.precision import LossScale
from mpsdk_torch.topology import Groups

SLOTS = {"adamw": {"exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}, "sgd": {"momentum": "momentum_buffer"}}
"""Checkpoint slots and torch's names for them."""
STEP = "step"


class Slot(NamedTuple):
    """A parameter of which some elements lie here, and the plain tensor over the same memory that is updated."""

    held: Held
    leaf: nn.Parameter


class ShardedOptimizer:
    """AdamW or SGD over the parameters held here.

    Args:
        held: this rank's parameters, in the memory that they will keep.
        loss_scale: what the loss was multiplied by; divided out again here.
    """

    def __init__(
        self, held: Sequence[Held], training: Training, groups: Groups, loss_scale: LossScale
    ) -> None:
        self.held, self.training, self.groups, self.loss_scale = held, training, groups, loss_scale
        self._updated = [Slot(item, nn.Parameter(item.local)) for item in held if item.local.numel()]
        self._torch = self._make()
        # By this protocol torch.amp.GradScaler drives a fused optimizer: a gradient divisor, and a flag that skips.
        assert getattr(self._torch, "_step_supports_amp_scaling", False)
        self.state: dict[str, dict[str, Tensor]] = {}  # by parameter: checkpoint slots, and torch's `step`
        for item, leaf in self._updated:
            self.state[item.name] = self._torch.state[leaf] = self._initial_state(leaf)

    def _make(self) -> torch.optim.Optimizer:
        training = self.training
        decayed = {True: training.weight_decay, False: 0.0}
        parameter_groups = [
            {"params": leaves, "weight_decay": weight_decay}
            for decays, weight_decay in decayed.items()
            if (leaves := [leaf for item, leaf in self._updated if item.planned.tensor.decay is decays])
        ]
        if training.optimizer == "adamw":
            return torch.optim.AdamW(
                parameter_groups, lr=0.0, betas=training.betas, eps=training.epsilon, fused=True
            )
        return torch.optim.SGD(parameter_groups, lr=0.0, momentum=training.momentum, fused=True)

    @property
    def slots(self) -> Mapping[str, str]:
        """Checkpoint slots in use, and torch's names for them."""
        if self.training.optimizer == "sgd" and self.training.momentum == 0.0:
            return {}
        return SLOTS[self.training.optimizer]

    def _initial_state(self, leaf: Tensor) -> dict[str, Tensor]:
        """What torch would make at the first step; made here, so that a checkpoint can be read into it."""
        state = {name: torch.zeros_like(leaf) for name in self.slots.values()}
        if self.training.optimizer == "adamw":
            state[STEP] = torch.zeros((), dtype=torch.float32, device=leaf.device)
        return state

    @torch.no_grad()
    def step(self, learning_rate: float) -> Tensor:
        """Reduce what is left to reduce, clip, update, and clear the gradients. Gives the global gradient norm."""
        gradients = self._gradients()
        self._sum_tied(gradients)
        self._sum_split(gradients)
        norm = self._global_norm(gradients) / self.loss_scale.scale
        overflowed = ~torch.isfinite(norm)
        divisor = self.loss_scale.scale
        if self.training.max_grad_norm is not None:
            divisor = divisor * (norm / self.training.max_grad_norm).clamp(min=1.0)
        for item, leaf in self._updated:
            leaf.grad = gradients[item.name]
        for group in self._torch.param_groups:
            group["lr"] = learning_rate
        skip = overflowed.to(torch.float32) if self.loss_scale.active else None
        vars(self._torch).update(grad_scale=divisor, found_inf=skip)
        self._torch.step()
        if self.loss_scale.active:
            self.loss_scale.update(overflowed)
        for item in self.held:
            item.parameter.grad = None
        self._torch.zero_grad()
        return norm

    def _gradients(self) -> dict[str, Tensor]:
        """The gradient of every parameter updated here. Each must have one: the schedule has run over all of the model."""
        gradients: dict[str, Tensor] = {}
        for item, _ in self._updated:
            gradient = item.gradient
            if gradient is None:
                raise BackendError(f"{item.name} was left without a gradient: its reduction did not happen")
            gradients[item.name] = gradient
        return gradients

    def _sum_tied(self, gradients: Mapping[str, Tensor]) -> None:
        """A tied tensor has a copy on the first stage and one on the last; both get the sum of their gradients."""
        copies = [gradients[item.name] for item, _ in self._updated if item.planned.tied]
        if self.groups.tied is not None:
            _all_reduce_flat(copies, self.groups.tied)
        elif copies:  # both stages are here, as in a schedule shaped like a V
            first, last = copies
            last.copy_(first.add_(last))

    def _sum_split(self, gradients: Mapping[str, Tensor]) -> None:
        """A replicated parameter may see only a part of the sequence, or of the heads, on each tensor-parallel rank."""
        group = self.groups.tensor
        if group.handle is not None:
            split = [
                gradients[item.name]
                for item, _ in self._updated
                if item.planned.tensor.sums_gradient(sequence_parallel=group.sequence_parallel)
            ]
            _all_reduce_flat(split, group.handle)

    def _global_norm(self, gradients: Mapping[str, Tensor]) -> Tensor:
        """The 2-norm of the whole model's gradient, each element counted by its one owner."""
        owned = [gradients[item.name] for item, _ in self._updated if item.planned.owned]
        total = torch.zeros((), dtype=torch.float32, device=self.groups.device)
        if owned:
            total = torch.nn.utils.get_total_norm(owned).square()
        if self.groups.model is not None:
            dist.all_reduce(total, group=self.groups.model)
        return total.sqrt()


def _all_reduce_flat(gradients: list[Tensor], group: dist.ProcessGroup | None) -> None:
    """Sum over `group` in one message."""
    if not gradients:
        return
    if len(gradients) == 1 and gradients[0].is_contiguous():  # such as a tied embedding's, which is large
        dist.all_reduce(gradients[0], group=group)
        return
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat, group=group)
    sizes = [gradient.numel() for gradient in gradients]
    for gradient, part in zip(gradients, flat.split(sizes), strict=True):
        gradient.copy_(part.view_as(gradient))
