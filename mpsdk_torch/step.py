"""One training step on this rank: count the valid tokens, run the schedule, update."""

from __future__ import annotations

import resource
from collections.abc import Callable, Mapping

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from mpsdk.backend import IGNORED_LABEL, Batch, Evaluation, Place
from mpsdk.plan import Plan
from mpsdk.profile import TOKEN_COUNT, UPDATE
from mpsdk_torch.dropout import Moment
from mpsdk_torch.executor import Executor, Watch
from mpsdk_torch.loss import class_cross_entropy_sum, confusion, cross_entropy_sum, own_labels
from mpsdk_torch.optimizer import ShardedOptimizer
from mpsdk_torch.precision import COMPUTE_DTYPES
from mpsdk_torch.reach import pooled_index
from mpsdk_torch.replicated import ReplicatedReduction
from mpsdk_torch.sharded import ShardedReduction, needs_sharding, release
from mpsdk_torch.topology import Groups
from mpsdk_torch.transformer import Transformer


class Trainer:
    """Drives the executor over a step's batch.

    The loss is the sum of token losses over the count of valid tokens in the global batch, known before the first
    backward, so that every layout gives the gradient that one process would.
    """

    def __init__(
        self,
        plan: Plan,
        place: Place,
        groups: Groups,
        stages: Mapping[int, Transformer],
        optimizer: ShardedOptimizer,
    ) -> None:
        self.plan, self.place, self.groups, self.stages, self.optimizer = (
            plan,
            place,
            groups,
            stages,
            optimizer,
        )
        assert plan.description.spec is not None
        self._spec = plan.description.spec
        self._step = 0
        self._pass = 0
        self._batch: dict[str, Tensor] = {}
        self._divisor = torch.ones((), device=groups.device)
        self._sum = torch.zeros((), device=groups.device)
        self._confusion = torch.zeros((0, 0), dtype=torch.int64, device=groups.device)
        self._executor = Executor(
            {number: self._forward_of(number) for number in stages},
            self._loss,
            stage_rank=plan.schedule.stage_rank,
            links=groups.links,
            hidden=self._empty_hidden,
            reduction=ShardedReduction(stages, plan)
            if needs_sharding(plan)
            else ReplicatedReduction(stages, groups.data),
            note=self._note,
        )

    def step(self, batch: Batch, *, step: int, learning_rate: float) -> PendingStep:
        """Train on `batch`, see `mpsdk.backend.Batch`."""
        with self._executor.watch.phase(TOKEN_COUNT):
            count = self._begin(batch, step)
        divisor = count.clamp(min=1.0)
        self._divisor = divisor / self.optimizer.loss_scale.scale
        actions = self.plan.actions(self.place.rank)
        passes = self.plan.training.accumulation
        for self._pass in range(passes):
            self._executor.run(actions, final=self._pass == passes - 1)
        self._note("updating")
        scale = self.optimizer.loss_scale.scale.clone()
        with self._executor.watch.phase(UPDATE):
            norm = self.optimizer.step(learning_rate)
        return PendingStep(self, loss=self._sum / divisor, norm=norm, loss_scale=scale)

    def watched_by(self, watch: Watch) -> None:
        """Have the steps from now on tell `watch` what they do."""
        self._executor.watch = watch

    def evaluate(self, batch: Batch, *, step: int) -> Evaluation:
        """See `mpsdk.backend.Backend.evaluate`."""
        count = self._begin(batch, step)
        classes = self._spec.head.labels
        self._confusion = torch.zeros((classes, classes), dtype=torch.int64, device=self.groups.device)
        self._divisor = torch.ones_like(self._sum)
        actions = self.plan.evaluation_schedule.actions[self.groups.coordinates.pp]
        for stage in self.stages.values():
            stage.eval()
        for self._pass in range(batch["labels"].shape[0]):
            self._executor.evaluate(actions)
        for stage in self.stages.values():
            stage.train()
            release(stage)
        loss = float(self.sum_over_world(self._sum))
        if not classes:
            return Evaluation(loss, float(count))
        counted = self._confusion if self._counts_tokens else torch.zeros_like(self._confusion)
        return Evaluation(loss, float(count), self.reduce(counted).cpu().numpy())

    def _begin(self, batch: Batch, step: int) -> Tensor:
        """Take up a batch, and count its valid tokens over all data ranks."""
        self._step = step
        self._batch = self._to_device(batch)
        self._sum = torch.zeros((), device=self.groups.device)
        return self._count_tokens(self._batch["labels"])

    def sum_over_world(self, value: Tensor) -> Tensor:
        """The sum over data ranks of what the last stage counted, on every rank."""
        return self.reduce(value * self._counts_loss)

    @property
    def _counts_loss(self) -> bool:
        """The loss is the same on all tensor-parallel ranks of the last stage: one of them speaks for it."""
        return (len(self.plan.stages) - 1) in self.stages and self.groups.coordinates.tp == 0

    @property
    def _counts_tokens(self) -> bool:
        """Under sequence parallelism each tensor-parallel rank has counted the tokens of its own part."""
        here = (len(self.plan.stages) - 1) in self.stages
        return here if self.groups.tensor.sequence_parallel else self._counts_loss

    def reduce(self, value: Tensor, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
        if self.place.world_size > 1:
            dist.all_reduce(value, op=op)
        return value

    # -- what the executor calls ------------------------------------------------------------------------------------

    def _forward_of(self, number: int) -> Callable[[Tensor | None, int], Tensor]:
        stage = self.stages[number]

        def forward(hidden: Tensor | None, microbatch: int) -> Tensor:
            inputs = self._rows("input_ids", microbatch) if hidden is None else hidden
            return stage(
                inputs,
                self._moment(microbatch),
                attention_mask=self._rows("attention_mask", microbatch),
                token_type_ids=self._rows("token_type_ids", microbatch),
            )

        return forward

    def _rows(self, name: str, microbatch: int) -> Tensor | None:
        """A microbatch's rows of an array of the batch; None: the batch has no such array."""
        array = self._batch.get(name)
        return None if array is None else array[self._pass, microbatch]

    def _loss(self, logits: Tensor, microbatch: int) -> Tensor:
        spec, group = self._spec, self.groups.tensor
        labels = self._batch["labels"][self._pass, microbatch]
        if not spec.head.classifies:
            total = cross_entropy_sum(logits, labels, vocab_size=spec.vocab_size, group=group)
        else:
            labels = self._own_labels(labels, microbatch)
            total = class_cross_entropy_sum(logits, labels, group=group)
            if not torch.is_grad_enabled():
                self._confusion += confusion(logits, labels)
        self._sum += total.detach()
        return total / self._divisor

    def _own_labels(self, labels: Tensor, microbatch: int) -> Tensor:
        length, pooled = self.plan.training.sequence_length, None
        if self._spec.head.objective == "sequence-classification":
            mask = self._rows("attention_mask", microbatch)
            pooled = pooled_index(self._spec, mask, length, labels.shape[0], labels.device)
        return own_labels(labels, pooled, length=length, group=self.groups.tensor)

    def _moment(self, microbatch: int) -> Moment:
        """Numbers this microbatch over the whole global batch, so that no two share a dropout mask."""
        plan = self.plan
        data_rank = plan.topology.data_rank(self.place.rank)
        number = (self._pass * plan.data_size + data_rank) * plan.microbatches + microbatch
        return Moment(plan.training.seed, self._step, number)

    def _empty_hidden(self) -> Tensor:
        plan, tensor = self.plan, self.groups.tensor
        length = plan.training.sequence_length // (tensor.size if tensor.sequence_parallel else 1)
        return torch.empty(
            (plan.microbatch_size, length, self._spec.hidden_size),
            dtype=COMPUTE_DTYPES[plan.distribution.precision.mode],
            device=self.groups.device,
        )

    def _note(self, activity: str) -> None:
        self.place.note(f"step {self._step}: {activity}")

    # -- the batch --------------------------------------------------------------------------------------------------

    def _to_device(self, batch: Batch) -> dict[str, Tensor]:
        """The step's whole batch, on its way to the device without anybody waiting for it."""
        tensors = {name: torch.from_numpy(np.ascontiguousarray(rows)) for name, rows in batch.items()}
        if self.groups.device.type != "cpu":
            tensors = {name: rows.pin_memory() for name, rows in tensors.items()}
        return {
            name: rows.to(self.groups.device, torch.int64, non_blocking=True)
            for name, rows in tensors.items()
        }

    def _count_tokens(self, labels: Tensor) -> Tensor:
        """Valid tokens of the whole global batch, on the device."""
        count = (labels != IGNORED_LABEL).sum()
        if self.groups.data is not None:
            self._note("all_reduce of the token count")
            dist.all_reduce(count, group=self.groups.data)
        return count.to(torch.float32)


class PendingStep:
    """A step's results, still on the device."""

    def __init__(self, trainer: Trainer, *, loss: Tensor, norm: Tensor, loss_scale: Tensor) -> None:
        self._trainer, self._loss, self._norm, self._loss_scale = trainer, loss, norm, loss_scale

    def wait(self) -> None:
        device = self._trainer.groups.device
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    def read(self, *, stop: bool = False) -> dict[str, float]:
        """See `mpsdk.backend.StepResult`. Collective: every rank calls it after the same step."""
        trainer = self._trainer
        trainer._note("reading the loss")
        device = trainer.groups.device
        loss = trainer.sum_over_world(self._loss)
        largest = torch.tensor([float(stop), float(_peak_memory(device))], dtype=torch.float64).to(device)
        stopped, peak = trainer.reduce(largest, dist.ReduceOp.MAX).tolist()
        values = {
            "loss": float(loss),
            "grad_norm": float(self._norm),
            "peak_memory_bytes": peak,
            "stop": stopped,
        }
        if trainer.optimizer.loss_scale.active:
            values["loss_scale"] = float(self._loss_scale)
        return values


def _peak_memory(device: torch.device) -> int:
    """Bytes: the allocator's peak on a GPU, the process's resident peak on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
