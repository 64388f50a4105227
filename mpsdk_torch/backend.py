"""The PyTorch backend: the eight verbs, each one line of the rooms beside it."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from mpsdk.backend import Batch, Evaluation, Place, RankState, StepResult, TensorSource
from mpsdk.description import ModelDescription
from mpsdk.errors import BackendError, ConfigError, Problem
from mpsdk.families import FAMILIES
from mpsdk.plan import Plan
from mpsdk_torch.checkpoint import fill_optimizer, fill_weights, rank_state
from mpsdk_torch.compiled import forget_programs, prepare_compiler
from mpsdk_torch.optimizer import ShardedOptimizer
from mpsdk_torch.parallelize import parallelize
from mpsdk_torch.parameters import held_parameters
from mpsdk_torch.precision import LossScale
from mpsdk_torch.profile import measured
from mpsdk_torch.sharded import needs_sharding
from mpsdk_torch.step import Trainer
from mpsdk_torch.topology import Groups, join, make_groups


@dataclass(frozen=True)
class _Built:
    groups: Groups
    optimizer: ShardedOptimizer
    trainer: Trainer


class TorchBackend:
    """See `mpsdk.backend.Backend`."""

    def __init__(self) -> None:
        self._built: _Built | None = None

    def describe(self, model: object) -> ModelDescription:
        known = ", ".join(FAMILIES)
        remedy = (
            f"the PyTorch backend trains the model families so far; give a configuration of one of: {known}"
        )
        raise ConfigError([Problem("model", type(model).__name__, remedy)])

    def build(self, plan: Plan, place: Place) -> None:
        device = join(place)
        groups = make_groups(plan, place, device, sharding=needs_sharding(plan))
        if plan.distribution.compile.enabled:
            prepare_compiler(device, place.note)
        stages = {number: parallelize(plan, number, groups) for number in plan.stages_of(place.rank)}
        held = held_parameters(plan, stages, tp=groups.coordinates.tp, sdp=groups.coordinates.sdp)
        loss_scale = LossScale(plan.distribution.precision, device)
        optimizer = ShardedOptimizer(held, plan.training, groups, loss_scale)
        self._built = _Built(groups, optimizer, Trainer(plan, place, groups, stages, optimizer))

    def step(self, batch: Batch, *, step: int, learning_rate: float) -> StepResult:
        return self._ready.trainer.step(batch, step=step, learning_rate=learning_rate)

    def profile(self, directory: Path | None) -> AbstractContextManager[None]:
        trainer, device = self._ready.trainer, self._ready.groups.device
        return measured(directory, trainer.place, device, trainer.watched_by)

    def evaluate(self, batch: Batch, *, step: int) -> Evaluation:
        return self._ready.trainer.evaluate(batch, step=step)

    def shards(self) -> RankState:
        return rank_state(self._ready.optimizer, writes=self._ready.groups.coordinates.dp == 0)

    def load(self, source: TensorSource) -> None:
        fill_weights(self._ready.optimizer.held, source)
        fill_optimizer(self._ready.optimizer, source)

    def close(self) -> None:
        if self._built is not None and self._built.trainer.plan.distribution.compile.enabled:
            forget_programs()
        self._built = None
        if dist.is_initialized():
            dist.destroy_process_group()

    @property
    def _ready(self) -> _Built:
        if self._built is None:
            raise BackendError("build the backend with a plan first")
        return self._built
