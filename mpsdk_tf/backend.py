"""The TensorFlow backend: the eight verbs, each one line of the rooms beside it."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import tensorflow as tf

from mpsdk.backend import Batch, Evaluation, Place, RankState, StepResult, TensorSource
from mpsdk.config import Precision
from mpsdk.description import ModelDescription
from mpsdk.errors import BackendError, ConfigError, Problem
from mpsdk.factory import Factory
from mpsdk.families import FAMILIES
from mpsdk.plan import Plan
from mpsdk_tf.checkpoint import fill_optimizer, fill_weights, rank_state
from mpsdk_tf.compiled import is_compiled, verify_compiler
from mpsdk_tf.keras_model import FirstValues, make, make_for
from mpsdk_tf.optimizer import ShardedOptimizer
from mpsdk_tf.parallelize import parallelize
from mpsdk_tf.parameters import held_parameters
from mpsdk_tf.precision import LossScale
from mpsdk_tf.profile import measured
from mpsdk_tf.recompute import repeat_exactly
from mpsdk_tf.stage import Feed
from mpsdk_tf.step import Trainer
from mpsdk_tf.topology import Groups, Membership, join, make_groups


@dataclass(frozen=True)
class _Built:
    membership: Membership
    groups: Groups
    optimizer: ShardedOptimizer
    trainer: Trainer


class TensorFlowBackend:
    """See `mpsdk.backend.Backend`.

    Args:
        threads: the ranks are threads of one process, each on a logical CPU device of its own.
    """

    def __init__(self, *, threads: bool = False) -> None:
        self._threads = threads
        self._built: _Built | None = None

    def describe(self, model: object) -> ModelDescription:
        if isinstance(model, Factory):
            return make(model, seed=0, precision=Precision(), device="/device:CPU:0").description()
        known = ", ".join(FAMILIES)
        remedy = f"give a callable that makes a Keras model, or a configuration of one of the model families: {known}"
        raise ConfigError([Problem("model", type(model).__name__, remedy)])

    def build(self, plan: Plan, place: Place) -> None:
        membership = join(place, threads=self._threads)
        groups = make_groups(plan, place, membership.device)
        repeat_exactly()
        with tf.device(groups.device):
            if is_compiled(plan):
                verify_compiler(groups.device)
            made = None
            if plan.description.factory is not None:
                made = make_for(plan, groups.device.replace("GPU", "CPU"), groups.tensor)
            feed = Feed()
            held = held_parameters(
                plan, plan.stages_of(place.rank), tp=groups.coordinates.tp, sdp=groups.coordinates.sdp
            )
            stages = {
                number: parallelize(plan, number, of, groups, feed, made) for number, of in held.items()
            }
            loss_scale = LossScale(plan.distribution.precision)
            optimizer = ShardedOptimizer(held, plan.training, groups, loss_scale)
            digest = "" if made is None else made.digest
            trainer = Trainer(plan, place, groups, stages, optimizer, feed, digest=digest)
            if made is not None:
                fill_weights(optimizer.held, FirstValues(made))
                made.let_go()
        self._built = _Built(membership, groups, optimizer, trainer)

    def step(self, batch: Batch, *, step: int, learning_rate: float) -> StepResult:
        return self._ready.trainer.step(batch, step=step, learning_rate=learning_rate)

    def profile(self, directory: Path | None) -> AbstractContextManager[None]:
        if self._threads:
            raise BackendError("ranks that are threads share one profiler; profile ranks that are processes")
        trainer = self._ready.trainer
        return measured(directory, trainer.plan, trainer.place, trainer.groups)

    def evaluate(self, batch: Batch, *, step: int) -> Evaluation:
        return self._ready.trainer.evaluate(batch, step=step)

    def shards(self) -> RankState:
        return rank_state(self._ready.optimizer, writes=self._ready.groups.coordinates.dp == 0)

    def load(self, source: TensorSource) -> None:
        fill_weights(self._ready.optimizer.held, source)
        fill_optimizer(self._ready.optimizer, source)

    def close(self) -> None:
        if self._built is not None:
            self._built.membership.stop_watching()
        self._built = None

    @property
    def _ready(self) -> _Built:
        if self._built is None:
            raise BackendError("build the backend with a plan first")
        return self._built
