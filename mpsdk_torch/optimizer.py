"""The optimizer on this rank's shards: tied and split gradients summed, the global norm, clipping, and the update.

The update runs torch's own fused AdamW or SGD on plain local tensors. Clipping and the loss scale go into the fused
kernel as its gradient divisor, and an overflowed step is skipped by it, so nothing is read back from the device.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mpsdk.config import Training
from mpsdk_torch.parameters import Held
from mpsdk_torch.precision import LossScale
from mpsdk_torch.topology import Groups

SLOTS = {"adamw": {"exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}, "sgd": {"momentum": "momentum_buffer"}}
"""Checkpoint slots and torch's names for them."""


class ShardedOptimizer:
    """AdamW or SGD over the parameters held here.

    Args:
        held: this rank's parameters, filled.
        loss_scale: what the loss was multiplied by; divided out again here.
    """

    def __init__(
        self, held: Sequence[Held], training: Training, groups: Groups, loss_scale: LossScale
    ) -> None:
        self.held, self.training, self.groups, self.loss_scale = held, training, groups, loss_scale
        self._leaves = {id(item): nn.Parameter(item.local) for item in held if item.local.numel()}
        self.slots = dict(SLOTS[training.optimizer])
        if training.optimizer == "sgd" and training.momentum == 0.0:
            self.slots = {}
        self._torch = self._make()

    def _make(self) -> torch.optim.Optimizer:
        training = self.training

        def leaves(decay: bool) -> list[nn.Parameter]:
            return [
                self._leaves[id(h)]
                for h in self.held
                if h.planned.tensor.decay is decay and id(h) in self._leaves
            ]

        parameter_groups = [
            {"params": leaves(decay), "weight_decay": training.weight_decay if decay else 0.0}
            for decay in (True, False)
            if leaves(decay)
        ]
        if training.optimizer == "adamw":
            return torch.optim.AdamW(
                parameter_groups, lr=0.0, betas=training.betas, eps=training.epsilon, fused=True
            )
        return torch.optim.SGD(parameter_groups, lr=0.0, momentum=training.momentum, fused=True)

    def state(self, item: Held) -> dict[str, Tensor]:
        """The optimizer's tensors for one parameter, made of zeros the first time; includes torch's `step`."""
        leaf = self._leaves[id(item)]
        state = self._torch.state[leaf]
        for name in self.slots.values():
            state.setdefault(name, torch.zeros_like(leaf))
        if self.training.optimizer == "adamw":
            state.setdefault("step", torch.zeros((), dtype=torch.float32, device=leaf.device))
        return state

    def holds(self, item: Held) -> bool:
        """Whether any element of the parameter lies on this rank."""
        return id(item) in self._leaves

    def step(self, learning_rate: float) -> Tensor:
        """Reduce what is left to reduce, clip, update, and clear the gradients. Gives the global gradient norm."""
        self._sum_tied_gradients()
        self._sum_split_gradients()
        norm = self._global_norm() / self.loss_scale.scale
        overflowed = ~torch.isfinite(norm)
        divisor = self.loss_scale.scale
        if self.training.max_grad_norm is not None:
            divisor = divisor * (norm / self.training.max_grad_norm).clamp(min=1.0)
        for item in self.held:
            if self.holds(item):
                leaf = self._leaves[id(item)]
                leaf.grad = item.gradient
                self.state(item)
        for group in self._torch.param_groups:
            group["lr"] = learning_rate
        # The protocol by which torch.amp.GradScaler drives fused optimizers: a divisor, and a flag that skips.
        skip = overflowed.to(torch.float32) if self.loss_scale.active else None
        vars(self._torch).update(grad_scale=divisor, found_inf=skip)
        self._torch.step()
        if self.loss_scale.active:
            self.loss_scale.update(overflowed)
        self.clear()
        return norm

    def clear(self) -> None:
        for item in self.held:
            item.parameter.grad = None
        for leaf in self._leaves.values():
            leaf.grad = None

    def _sum_tied_gradients(self) -> None:
        """A tied tensor has a copy on the first stage and one on the last; both get the sum of their gradients."""
        copies = _gradients(item for item in self.held if item.planned.tied)
        if self.groups.tied is not None:
            _all_reduce_flat(copies, self.groups.tied)
        elif copies:  # both stages are here, as in a schedule shaped like a V
            first, last = copies
            last.copy_(first.add_(last))

    def _sum_split_gradients(self) -> None:
        """Under sequence parallelism a replicated parameter sees only a part of the sequence on each rank."""
        if not self.groups.tensor.sequence_parallel:
            return
        replicated = (h for h in self.held if h.planned.tensor.cut_dimension is None)
        _all_reduce_flat(_gradients(replicated), self.groups.tensor.handle)

    def _global_norm(self) -> Tensor:
        """The 2-norm of the whole model's gradient, each element counted by its one owner."""
        owned = _gradients(h for h in self.held if h.planned.owned)
        total = torch.zeros((), dtype=torch.float32, device=self.groups.device)
        if owned:
            total = torch.nn.utils.get_total_norm(owned).square()
        if self.groups.model is not None:
            dist.all_reduce(total, group=self.groups.model)
        return total.sqrt()


def _gradients(items: Iterable[Held]) -> list[Tensor]:
    return [gradient for item in items if (gradient := item.gradient) is not None and gradient.numel()]


def _all_reduce_flat(gradients: list[Tensor], group: dist.ProcessGroup | None) -> None:
    """Sum over `group` in one message."""
    if not gradients:
        return
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat, group=group)
    for gradient, part in zip(
        gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True
    ):
        gradient.copy_(part.view_as(gradient))
