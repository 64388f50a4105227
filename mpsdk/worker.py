"""The one training loop, whatever the framework, the model and the layout.

    python -m mpsdk.worker JOBFILE        # one rank of a run, started by a launcher

Rank 0 decides where the run starts and commits checkpoints; the others follow through the control plane. Between two
logging steps the ranks do nothing but read batches and step: results stay on the device, and a wish to stop (SIGTERM on
any rank, a callback, the launcher) waits for the next logging step, where `StepResult.read` makes all ranks agree on it.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Generator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpsdk.backend import WEIGHT, Evaluation, Place, StepResult, TensorSource, load_backend
from mpsdk.checkpoint import Checkpoint, commit, find, prune, remove_leftovers, step_directory, write_rank
from mpsdk.checkpoint.names import step_of
from mpsdk.data import Samples, SampleStream, evaluation_batches, training_batch
from mpsdk.errors import WorkerError
from mpsdk.factory import make_importable
from mpsdk.launch.control import Control
from mpsdk.launch.environment import generation_from_environment, run_directory_from_environment
from mpsdk.launch.worker_main import guard
from mpsdk.metrics import measured, validation_row
from mpsdk.profile import PLAN_FILE, step_folder
from mpsdk.report.history import History, only_finite
from mpsdk.resume import Start, find_start
from mpsdk.work_order import EVENTS_FILE, HISTORY_FILE, PreparedData, WorkOrder

Emit = Callable[[dict[str, Any]], object]
"""Takes an event of `mpsdk.report.reporter`; "stop" as an answer asks for a stop."""


class Work:
    """One rank's work on an order: `run` it once.

    Args:
        place: where this rank stands.
        control: this rank's side of the agreement between ranks.
        generation: the name of this start of the run, equal on all ranks.
        emit: told the run's events, on rank 0 alone.
    """

    def __init__(self, order: WorkOrder, place: Place, control: Control, generation: str, emit: Emit) -> None:
        self.order, self.plan, self.training = order, order.plan, order.plan.training
        self.place, self.control, self.generation, self.emit = place, control, generation, emit
        self.leads = place.rank == 0
        self.backend = load_backend(self.plan.framework)
        self.history = History(Path(order.output_dir, HISTORY_FILE)) if self.leads else None
        self.validation = self._open(order.validation) if order.validation else None
        self.step = 0  # optimizer steps done
        self.samples_consumed = 0
        self._stop_wanted = False
        self.evaluation: dict[str, float] | None = None  # what the last one measured
        self._saved: int | None = None  # the step of the last checkpoint
        self._result: StepResult | None = None  # of the newest step, perhaps still under way
        self._batch_layout = {
            "accumulation": self.training.accumulation,
            "microbatches": self.plan.microbatches,
            "microbatch_size": self.plan.microbatch_size,
            "data_rank": self.plan.topology.data_rank(place.rank),
            "data_size": self.plan.data_size,
        }
        self._arrays = tuple(self.plan.batch_shapes)

    def run(self) -> None:
        """Train or evaluate. After an error the backend stays open: closing it might wait for a rank that is gone."""
        self.place.note("looking for where to start")
        start = Start(*self.control.decide("start", self._find_start))
        self.step, self.samples_consumed = start.step, start.samples_consumed
        self.place.note("building the model")
        make_importable(self.order.import_from)
        self.backend.build(self.plan, self.place)
        self.place.note("loading the weights")
        source = self._source(start)
        if source is not None:
            self.backend.load(source)
        if self.order.mode == "evaluate":
            self._evaluate()
        else:
            with _on_sigterm(self._want_stop):
                self._train(start)
        self.place.note("leaving")
        self.backend.close()

    # -- the loop ---------------------------------------------------------------------------------------------------

    def _train(self, start: Start) -> None:
        training, checkpoints = self.training, self.plan.distribution.checkpoint
        assert self.order.train is not None
        dataset = self._open(self.order.train)
        stream = SampleStream(len(dataset), dataset.fingerprint, training.seed)
        self._begin(start)
        stopped = False
        last_finite = start.step
        clock = _Clock()
        while self.step < training.steps and not stopped:
            result = self._take_step(dataset, stream, clock)
            clock.steps += 1
            if self.step == 1 or self._is_due(training.log_every):
                values = result.read(stop=self._stop_wanted or self.control.stop_requested)
                self._refuse_divergence(values["loss"], last_finite)
                self._log(values, clock.lap())
                last_finite, stopped = self.step, values["stop"] > 0
            evaluates, saves = self._is_due(training.evaluate_every), self._is_due(checkpoints.every)
            if evaluates or saves:
                self._wait()
            with clock.paused():
                if evaluates:
                    self._evaluate()
                if saves:
                    self._save()
        self._save()
        self._tell("end", step=self.step, reason="stopped" if self.step < training.steps else "finished")

    def _take_step(self, dataset: Samples, stream: SampleStream, clock: _Clock) -> StepResult:
        self.place.note(f"step {self.step}: reading the batch")
        consumed = self.samples_consumed
        batch = training_batch(
            dataset, stream, samples_consumed=consumed, arrays=self._arrays, **self._batch_layout
        )
        self.place.note(f"step {self.step}: training")
        learning_rate = self.training.learning_rate_at(self.step)
        with self._profiling(clock):
            result = self._result = self.backend.step(batch, step=self.step, learning_rate=learning_rate)
        self.step += 1
        self.samples_consumed += self.training.global_batch
        return result

    @contextlib.contextmanager
    def _profiling(self, clock: _Clock) -> Generator[None]:
        """Around the next step, which is measured if that was asked for. Getting ready and writing is not training time."""
        profile, number = self.order.profile, self.step + 1
        if number not in (profile.steps or ()):
            yield
            return
        directory = step_folder(self.order.output_dir, number)
        wanted = profile.asks_for(step=number, rank=self.place.rank)
        with contextlib.ExitStack() as stack:
            self._wait()
            with clock.paused():
                self.place.note(f"step {self.step}: starting the profile")
                self.control.decide(f"profile-{number}", lambda: self._make_folder(directory))
                stack.enter_context(self.backend.profile(directory if wanted else None))
            yield
            self._wait()
            with clock.paused():
                self.place.note(f"step {self.step}: writing the profile")
                stack.close()

    def _wait(self) -> None:
        """Until the device has done the steps that it has: they are training time, what follows isn't."""
        if self._result is not None:
            self._result.wait()

    def _make_folder(self, directory: Path) -> None:
        """An empty one, with the plan: what an earlier start of the run measured there may be of other ranks."""
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
        self.plan.save(directory / PLAN_FILE)

    # -- its parts --------------------------------------------------------------------------------------------------

    def _begin(self, start: Start) -> None:
        if start.own:
            self._saved = start.step
        if self.history is not None:
            self.history.truncate(start.step)
        self._tell(
            "start",
            step=start.step,
            steps=self.training.steps,
            parameters=self.plan.description.parameters,
            world_size=self.plan.world_size,
            plan_hash=self.plan.hash,
            tokens_per_step=self.plan.tokens_per_step,
        )
        if start.checkpoint is not None:
            self._tell("resume", step=start.step, path=start.checkpoint, warnings=start.warnings)

    def _log(self, values: Mapping[str, float], step_seconds: float) -> None:
        row: dict[str, Any] = {
            "step": self.step,
            "loss": values["loss"],
            "learning_rate": self.training.learning_rate_at(self.step - 1),
            "grad_norm": values["grad_norm"],
            "tokens": self.samples_consumed * self.training.sequence_length,
            "tokens_per_second": self.plan.tokens_per_step / step_seconds,
            "step_seconds": step_seconds,
            "peak_memory_bytes": int(values["peak_memory_bytes"]),
        }
        if "loss_scale" in values:
            row["loss_scale"] = values["loss_scale"]
        row = only_finite(row)
        self._record(row)
        self._tell("log", **row)

    def _evaluate(self) -> None:
        """Loss and metrics over the validation data, if there are any; the same on all ranks, as the backends' sums are."""
        if self.validation is None:
            return
        total = Evaluation(0.0, 0.0)
        batches = evaluation_batches(self.validation, arrays=self._arrays, **self._batch_layout)
        for number, batch in enumerate(batches):
            self.place.note(f"evaluation {self.step}: batch {number}")
            total = total.joined(self.backend.evaluate(batch, step=self.step))
        self.evaluation = measured(total)
        if self.order.mode == "train":
            self._record({"step": self.step, **validation_row(self.evaluation)})
        self._tell("evaluate", step=self.step, **self.evaluation)

    def _save(self) -> None:
        """A checkpoint of this step, written by all ranks and committed by rank 0; once a step."""
        if self._saved == self.step:
            return
        self._saved = self.step
        root = self.order.checkpoints
        unfinished = step_directory(root, self.step, self.generation)
        self.place.note(f"step {self.step}: writing the checkpoint")
        part = write_rank(unfinished, self.place.rank, self.backend.shards())
        self.control.publish(f"written-{self.step}", part)
        parts = self.control.collect(f"written-{self.step}") if self.leads else []

        def finish() -> str:
            self.place.note(f"step {self.step}: committing the checkpoint")
            final = step_directory(root, self.step)
            commit(unfinished, final, parts, self._meta())
            # What was written a moment ago is not read again: `keep` asks for space, not for a verification.
            prune(root, self.plan.distribution.checkpoint.keep, protect=[self.step], payload=False)
            return final

        path = self.control.decide(f"committed-{self.step}", finish)
        self._tell("checkpoint", step=self.step, path=path)

    def _meta(self) -> dict[str, object]:
        description = self.plan.description
        return {
            "step": self.step,
            "samples_consumed": self.samples_consumed,
            "framework": self.plan.framework,
            "plan": self.plan.model_dump(mode="json"),
            "plan_hash": self.plan.hash,
            "seeds": {"training": self.training.seed},
            "naming": description.naming,
            "tied": {tensor.name: tensor.tied_to for tensor in description.tensors() if tensor.tied_to},
        }

    def _refuse_divergence(self, loss: float, last_finite: int) -> None:
        if math.isfinite(loss):
            return
        good = [
            path for path in find(self.order.checkpoints) if (step_of(Path(path).name) or 0) <= last_finite
        ]
        since = f"finite up to step {last_finite}" if last_finite else "never finite"
        if good:
            advice = f"The last good checkpoint is {good[0]}; remove later ones, if any, and resume from it"
        else:
            advice = "There is no checkpoint from before"
        raise WorkerError(
            f"the loss of step {self.step} is {loss}: training has diverged ({since}). {advice}. "
            "A lower training.learning_rate, more warmup_steps or a max_grad_norm may help"
        )

    # -- small things -----------------------------------------------------------------------------------------------

    def _is_due(self, every: int | None) -> bool:
        """Whether something that happens every so many steps, and after the last, is to happen now."""
        return self.step == self.training.steps or (every is not None and self.step % every == 0)

    def _find_start(self) -> Start:
        if self.order.mode == "train":
            remove_leftovers(self.order.checkpoints, generation=self.generation)
        return find_start(self.order)

    def _source(self, start: Start) -> TensorSource | None:
        if start.checkpoint is None:
            return self.order.initial_weights()
        checkpoint = Checkpoint.open(start.checkpoint)
        return checkpoint if self.order.mode == "train" else _WeightsOf(checkpoint)

    def _open(self, data: PreparedData) -> Samples:
        return data.open(self.training.sequence_length)

    def _record(self, row: Mapping[str, Any]) -> None:
        if self.history is not None:
            self.history.append(row)

    def _tell(self, event: str, **content: object) -> None:
        if self.leads and self.emit({"event": event, **content}) == "stop":
            self._want_stop()

    def _want_stop(self) -> None:
        self._stop_wanted = True


class _WeightsOf:
    """A checkpoint without its optimizer state, which an evaluation has no use for."""

    slots: frozenset[str] = frozenset({WEIGHT})

    def __init__(self, source: TensorSource) -> None:
        self._source = source
        self.scalars: Mapping[str, float | int] = {}

    def read(
        self, name: str, slot: str, offset: tuple[int, ...], shape: tuple[int, ...]
    ) -> NDArray[np.float32]:
        return self._source.read(name, slot, offset, shape)


class _Clock:
    """Seconds a step since the last logging step; evaluations and checkpoints don't count."""

    def __init__(self) -> None:
        self.steps = 0
        self._since = time.perf_counter()

    def lap(self) -> float:
        now = time.perf_counter()
        seconds = (now - self._since) / self.steps
        self.steps, self._since = 0, now
        return seconds

    @contextlib.contextmanager
    def paused(self) -> Generator[None]:
        before = time.perf_counter()
        yield
        self._since += time.perf_counter() - before


@contextlib.contextmanager
def _on_sigterm(call: Callable[[], None]) -> Generator[None]:
    """While active, SIGTERM calls `call` instead of ending the process. Does nothing outside the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda number, frame: call())
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def work_as_process(order: WorkOrder, place: Place) -> None:
    """What a process that a launcher started does: the work, with its events in a file that the launcher follows."""
    directory = run_directory_from_environment() or Path(order.output_dir)
    generation = generation_from_environment()
    control = Control(directory, generation, place.rank, place.world_size, place.timeout, place.note)

    def write(event: dict[str, Any]) -> None:
        with Path(directory, EVENTS_FILE).open("a", encoding="utf-8") as file:
            file.write(json.dumps(event) + "\n")

    Work(order, place, control, generation, write).run()


def main() -> None:
    if len(sys.argv) != 2:
        raise SystemExit("usage: python -m mpsdk.worker JOBFILE")
    path = os.fspath(sys.argv[1])
    guard(lambda place: work_as_process(WorkOrder.load(path), place))
    # All work is done and on disk. Frameworks' own threads sometimes abort a process that tears itself down (gloo:
    # "terminate called without an active exception"), which would turn a finished run into a failed one.
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
