"""One training step on this rank, as one program: count the valid tokens, run the schedule, update."""

from __future__ import annotations

import resource
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import tensorflow as tf

from mpsdk.backend import IGNORED_LABEL, Batch, Evaluation, Place
from mpsdk.errors import BackendError
from mpsdk.plan import Plan
from mpsdk.profile import REDUCTION, TOKEN_COUNT, UPDATE
from mpsdk_tf.agreement import agree
from mpsdk_tf.comm import all_reduce, deadline
from mpsdk_tf.compiled import compiles_step
from mpsdk_tf.dropout import Moment
from mpsdk_tf.executor import Executor
from mpsdk_tf.optimizer import ShardedOptimizer
from mpsdk_tf.profile import scope
from mpsdk_tf.sharded import ShardedReduction
from mpsdk_tf.stage import Feed, Stage
from mpsdk_tf.tensor import Tensor
from mpsdk_tf.topology import Groups

_tracing = threading.Lock()  # ranks that are threads hinder each other when they trace at once


class Trainer:
    """Traces the programs of a rank, once each, and runs them on a step's batch.

    The loss is the sum of token losses over the count of valid tokens in the global batch, known before the first
    backward, so that every layout gives the gradient that one process would.

    Args:
        digest: of a user's own model, to be the same on all ranks.
    """

    def __init__(
        self,
        plan: Plan,
        place: Place,
        groups: Groups,
        stages: Mapping[int, Stage],
        optimizer: ShardedOptimizer,
        feed: Feed,
        *,
        digest: str = "",
    ) -> None:
        self.plan, self.place, self.groups, self.stages, self.optimizer = (
            plan,
            place,
            groups,
            stages,
            optimizer,
        )
        self._feed, self._digest = feed, digest
        self._step = 0
        self._reduction = ShardedReduction({number: stage.units for number, stage in stages.items()}, plan)
        self._executor = Executor(
            stages,
            stage_rank=plan.schedule.stage_rank,
            links=groups.links,
            reduction=self._reduction,
            note=self._note,
        )
        scalar = tf.TensorSpec((), tf.float32)
        arrays = [tf.TensorSpec(shape, tf.int32, name) for name, shape in plan.batch_shapes.items()]
        self._classes = 0 if plan.description.spec is None else plan.description.spec.head.labels
        self.train_program = tf.function(
            self._train,
            input_signature=[arrays, tf.TensorSpec((), tf.int64), scalar],
            autograph=False,
            jit_compile=True if compiles_step(plan) else None,
        )
        self.evaluation_program = tf.function(
            self._evaluate,
            input_signature=[arrays],
            autograph=False,
            jit_compile=True if compiles_step(plan) else None,
        )
        self._report_program = tf.function(
            self._report, input_signature=[scalar, tf.TensorSpec((2,), tf.float64)], autograph=False
        )
        self._agreed = False
        self._traced: set[str] = set()

    def step(self, batch: Batch, *, step: int, learning_rate: float) -> PendingStep:
        """Train on `batch`, see `mpsdk.backend.Batch`."""
        self._step = step
        inputs = self._take(batch)
        with self._running(self.train_program, "training"):
            loss, norm, scale = self.train_program(
                inputs, tf.constant(step, tf.int64), tf.constant(learning_rate, tf.float32)
            )
        return PendingStep(self, loss=loss, norm=norm, loss_scale=scale)

    def evaluate(self, batch: Batch, *, step: int) -> Evaluation:
        """See `mpsdk.backend.Backend.evaluate`."""
        self._step = step
        inputs = self._take(batch)
        with self._running(self.evaluation_program, "evaluating"):
            totals, count = self.evaluation_program(inputs)
            if not self._classes:
                return Evaluation(float(totals), float(count))
            found = totals.numpy()
        confusion = found[1:].reshape(self._classes, self._classes).astype(np.int64)
        return Evaluation(float(found[0]), float(count), confusion)

    def report(self, loss: Tensor, largest: Sequence[float]) -> tuple[float, list[float]]:
        """The sum of `loss` over data ranks, and the largest of the other values over all ranks."""
        with self._running(self._report_program, "reading the loss"):
            total, most = self._report_program(loss, tf.constant(largest, tf.float64))
            return float(total), [float(value) for value in most]

    @contextmanager
    def _running(self, program: tf.types.experimental.PolymorphicFunction, activity: str) -> Iterator[None]:
        """Run `program` on this rank's device; one that waits too long for other ranks ends with an error."""
        place = self.place
        with tf.device(self.groups.device):
            if activity not in self._traced:  # first, since its notes don't say that this rank waits
                with _tracing:
                    program.get_concrete_function()
                self._traced.add(activity)
            self._note(f"waiting with the other ranks, {activity}" if place.world_size > 1 else activity)
            with deadline(place.timeout, place.rank, f"step {self._step}, {activity}"):
                yield

    # -- the programs -----------------------------------------------------------------------------------------------

    def _train(
        self, arrays: list[Tensor], step: Tensor, learning_rate: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        self._note("tracing the training program")
        batch = dict(zip(self.plan.batch_shapes, arrays, strict=True))
        count = self._count_tokens(batch["labels"])
        divisor = tf.maximum(count, 1.0)
        scale = self.optimizer.loss_scale.scale.read_value()
        for stage in self.stages.values():
            stage.begin()
        passes = self.plan.training.accumulation
        actions = self.plan.actions(self.place.rank)

        def run(number: int | Tensor, sums: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
            read = self._feed_from(batch, step, number)
            self._reduction.begin(sums)
            total = self._executor.run(actions, read, scale / divisor)
            return total, self._reduction.sums

        if passes == 1:
            total, _ = run(0, {})
        else:

            def once_more(number: Tensor, total: Tensor, sums: dict[str, Tensor]) -> tuple[Tensor, ...]:
                added, sums = run(number, sums)
                return number + 1, total + added, sums

            start = (tf.constant(0), tf.zeros((), tf.float32), self._reduction.zeros())
            _, total, sums = tf.while_loop(
                lambda number, *_: number < passes, once_more, start, parallel_iterations=1
            )
            self._reduction.begin(sums)
        with scope(REDUCTION):
            gradients = self._reduction.finish()
        with scope(UPDATE):
            norm = self.optimizer.step(gradients, learning_rate)
        return total / divisor, norm, scale

    def _evaluate(self, arrays: list[Tensor]) -> tuple[Tensor, Tensor]:
        """The sum of losses, of a classifier with its confusions after it, and the count of valid labels."""
        self._note("tracing the evaluation program")
        batch = dict(zip(self.plan.batch_shapes, arrays, strict=True))
        shape = (1 + self._classes**2,) if self._classes else ()
        count = self._count_tokens(batch["labels"])
        for stage in self.stages.values():
            stage.begin()
        actions = self.plan.evaluation_schedule.actions[self.groups.coordinates.pp]

        def once_more(number: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
            read = self._feed_from(batch, tf.zeros((), tf.int64), number)
            return number + 1, total + self._executor.evaluate(actions, read, shape)

        start = (tf.constant(0), tf.zeros(shape, tf.float32))
        passes = self.plan.training.accumulation
        _, total = tf.while_loop(lambda number, _: number < passes, once_more, start, parallel_iterations=1)
        return self._sum_over_world(total), count

    def _report(self, loss: Tensor, largest: Tensor) -> tuple[Tensor, Tensor]:
        return self._sum_over_world(loss), all_reduce(largest, self.groups.world, "Max")

    def _sum_over_world(self, value: Tensor) -> Tensor:
        """The sum over data ranks of what the last stage counted, on every rank.

        The loss is the same on all tensor-parallel ranks of the last stage: one of them speaks for it.
        """
        counts = (len(self.plan.stages) - 1) in self.stages and self.groups.coordinates.tp == 0
        return all_reduce(value if counts else tf.zeros_like(value), self.groups.world)

    def _count_tokens(self, labels: Tensor) -> Tensor:
        """Valid tokens of the whole global batch."""
        with scope(TOKEN_COUNT):
            count = tf.reduce_sum(tf.cast(labels != IGNORED_LABEL, tf.float64))
            return tf.cast(all_reduce(count, self.groups.data), tf.float32)

    def _feed_from(
        self, batch: Mapping[str, Tensor], step: Tensor, number: int | Tensor
    ) -> Callable[[int], Tensor]:
        """Have parts read their arrays and moments of pass `number`; gives where the first stage reads its ids."""
        plan, data_rank = self.plan, self.plan.topology.data_rank(self.place.rank)

        def moment(microbatch: int) -> Moment:
            """Numbers a microbatch over the whole global batch, so that no two share a dropout mask."""
            of_pass = (number * plan.data_size + data_rank) * plan.microbatches
            return Moment(plan.training.seed, step, of_pass + microbatch)

        def rows_of(array: Tensor) -> Callable[[int], Tensor]:
            of_pass = array[number]
            return lambda microbatch: of_pass[microbatch]

        self._feed.arrays = {name: rows_of(array) for name, array in batch.items()}
        self._feed.moment = moment
        return self._feed.arrays["input_ids"]

    def _note(self, activity: str) -> None:
        self.place.note(f"step {self._step}: {activity}")

    # -- the batch --------------------------------------------------------------------------------------------------

    def _take(self, batch: Batch) -> list[Tensor]:
        """The step's batch, of the shape that the programs have. The first time, all ranks agree on their programs.

        Raises BackendError for another shape: a rank that ran another program than the rest would wait for ever.
        """
        shapes = self.plan.batch_shapes
        for name, shape in shapes.items():
            found = batch[name].shape if name in batch else None
            if found != shape:
                raise BackendError(
                    f"rank {self.place.rank} got {name} of shape {found}, and its plan has {shape} "
                    "(accumulation, microbatches, microbatch size, length); pad or drop what does not fill a batch"
                )
        if not self._agreed:
            self._note("agreeing on the programs with the other ranks")
            agree(self.plan, self.place, self.groups, self._digest)
            self._agreed = True
        with tf.device(self.groups.device):
            return [tf.constant(np.ascontiguousarray(batch[name]), tf.int32) for name in shapes]


class PendingStep:
    """A step's results, still on the device."""

    def __init__(self, trainer: Trainer, *, loss: Tensor, norm: Tensor, loss_scale: Tensor) -> None:
        self._trainer, self._loss, self._norm, self._loss_scale = trainer, loss, norm, loss_scale

    def wait(self) -> None:
        self._norm.numpy()

    def read(self, *, stop: bool = False) -> dict[str, float]:
        """See `mpsdk.backend.StepResult`. Collective: every rank calls it after the same step."""
        trainer = self._trainer
        loss, (stopped, peak) = trainer.report(self._loss, [float(stop), _peak_memory(trainer.groups)])
        values = {
            "loss": loss,
            "grad_norm": float(self._norm),
            "peak_memory_bytes": peak,
            "stop": stopped,
        }
        if trainer.optimizer.loss_scale.active:
            values["loss_scale"] = float(self._loss_scale)
        return values


def _peak_memory(groups: Groups) -> float:
    """Bytes: the allocator's peak on a GPU, the process's resident peak on a CPU."""
    if groups.on_gpu:
        return float(tf.config.experimental.get_memory_info("GPU:0")["peak"])
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
