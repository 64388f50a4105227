"""Run: what came of a job, read from its output directory, and what can be done with it."""

from __future__ import annotations

import atexit
import sys
import threading
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from mpsdk.checkpoint import Checkpoint, find
from mpsdk.errors import CheckpointError, ConfigError, Problem
from mpsdk.inputs import Preparation
from mpsdk.launch import Launcher, LocalLauncher, place_from_environment
from mpsdk.profile import PICTURE, step_folders
from mpsdk.report.history import History, Row
from mpsdk.report.plan_table import plan_timeline
from mpsdk.work_order import HISTORY_FILE, JOB_FILE, WorkOrder

if TYPE_CHECKING:
    from mpsdk.plan import Plan

EVALUATION_FILE = "evaluation.json"
DATA_CACHE = "data"
PICTURES = "pictures"
Dtype = Literal["float32", "bfloat16", "float16"]
LARGEST_PICTURE = 4096  # stages × microbatches: more bars than that nobody can tell apart


Evaluation = dict[str, float]
"""What `mpsdk.metrics.measured` makes of an evaluation: `loss`, over how many `tokens` or `labels`, and the objective's
metrics."""


class Run:
    """A run, finished or under way. Made by `Estimator.fit`, or from what it left by `Run.load`.

    Args:
        output_dir: where the run keeps everything.
        launcher: what `evaluate` starts its workers with.
        ending: where the run's work happens while `fit(wait=False)` has come back already.
    """

    def __init__(
        self, output_dir: str | Path, *, launcher: Launcher | None = None, ending: Background | None = None
    ) -> None:
        self.output_dir = Path(output_dir)
        self._launcher = launcher or LocalLauncher()
        self._ending = ending

    @classmethod
    def load(cls, output_dir: str | Path) -> Run:
        """The run that was made in `output_dir`. Raises ConfigError when there is none."""
        if not Path(output_dir, JOB_FILE).is_file():
            remedy = f"no run has been made there: it has no {JOB_FILE}"
            raise ConfigError([Problem("output_dir", str(output_dir), remedy)], where="the run")
        return cls(output_dir)

    @cached_property
    def _order(self) -> WorkOrder:
        order = WorkOrder.load(self.output_dir / JOB_FILE)
        return order.model_copy(
            update={"output_dir": str(self.output_dir.resolve())}
        )  # it may have been moved

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.output_dir)!r})"

    @property
    def plan(self) -> Plan:
        """What the run was resolved into."""
        return self._order.plan

    @property
    def history(self) -> list[Row]:
        """One row a logged step: `step, loss, learning_rate, grad_norm, tokens, tokens_per_second, step_seconds,
        peak_memory_bytes`, with fp16 also `loss_scale`. Between them, one row an evaluation: `step, validation_loss`
        and the objective's metrics, as `validation_perplexity`, `validation_accuracy`. A number that is not finite is None."""
        return History.load(self.output_dir / HISTORY_FILE)

    @property
    def latest_checkpoint(self) -> str | None:
        """The path of the newest complete checkpoint; None before the first."""
        return next(iter(self.checkpoints), None)

    @property
    def checkpoints(self) -> list[str]:
        """The paths of the complete checkpoints that are there, newest first."""
        return find(self._order.checkpoints)

    @property
    def profiles(self) -> list[Path]:
        """The directories of the steps that were profiled, in order. See `mpsdk.profile`."""
        return step_folders(self.output_dir)

    @property
    def pictures(self) -> list[Path]:
        """The pictures drawn when the run ended."""
        return sorted(Path(self.output_dir, PICTURES).glob("*.*"))

    def wait(self) -> Run:
        """Return when the run has ended; raises the error that ended it. Ctrl-C asks the run to stop, with a checkpoint."""
        if self._ending is not None:
            self._ending.join()
        return self

    def export(
        self,
        out_dir: str | Path,
        *,
        dtype: Dtype = "float32",
        max_shard_bytes: int = 2 << 30,
    ) -> Path:
        """Write the newest checkpoint as a directory that `transformers.AutoModel*.from_pretrained` loads.

        It holds the configuration that the model began with, the weights, and the files of the tokenizer. The tokenizer
        "bytes" has no files: its ids are the bytes of the UTF-8 text, and `eos_token_id` is 256 unless the configuration
        said otherwise.

        Args:
            out_dir: the directory to make; it must not exist, or be empty.
            dtype: what to round the weights to.
            max_shard_bytes: above this, the weights go to several files.

        Raises:
            ConfigError: `out_dir` is not empty, there is no such `dtype`, or the model belongs to no family.
            CheckpointError: there is no checkpoint, or it is damaged.
        """
        from mpsdk.families.hf import export

        spec = self.plan.description.spec
        if spec is None:
            remedy = "belongs to no family, and has no Hugging Face form"
            raise ConfigError([Problem("model", self.plan.description.name, remedy)], where="the export")
        if dtype not in get_args(Dtype):
            remedy = f"must be one of {', '.join(get_args(Dtype))}"
            raise ConfigError([Problem("dtype", dtype, remedy)], where="the export")
        hf_config, tokenizer_dir = self._order.carried()
        return export(
            Checkpoint.open(self._newest()),
            spec,
            out_dir,
            hf_config=hf_config,
            tokenizer_dir=tokenizer_dir,
            dtype=dtype,
            max_shard_bytes=max_shard_bytes,
        )

    def evaluate(self, data: object) -> Evaluation:
        """How good the newest checkpoint is on `data`, a source as `fit` takes it, computed with the run's own plan.

        The `loss`, in nats; of a language model `tokens`, how many it is the mean of, and `perplexity`; of a classifier
        `labels`, how many, `accuracy`, `f1_macro` and, with two classes, `f1`: see `mpsdk.metrics`.

        Raises CheckpointError when there is no checkpoint, ConfigError or DataError for the data, WorkerError when a
        worker fails.
        """
        if data is None:
            raise ConfigError([Problem("data", None, "give the data to evaluate on")], where="the evaluation")
        place = place_from_environment()
        if place is not None:
            from mpsdk.in_place import work_in_place

            work = work_in_place(place, str(self.output_dir), lambda: self._evaluation_of(data), _no_answer)
            assert work.evaluation is not None
            return work.evaluation
        heard: list[dict[str, Any]] = []
        order = self._evaluation_of(data)
        self._launcher.run(
            order.save(self.output_dir / EVALUATION_FILE),
            world_size=order.plan.world_size,
            run_directory=self.output_dir,
            on_event=heard.append,
        )
        (event,) = (event for event in heard if event["event"] == "evaluate")
        return {name: value for name, value in event.items() if name not in ("event", "step")}

    def _evaluation_of(self, data: object) -> WorkOrder:
        order = self._order
        newest = self._newest()
        preparation = Preparation(order, self.output_dir / DATA_CACHE)
        changes = {
            "mode": "evaluate",
            "resume": newest,
            "train": None,
            "validation": preparation.of_one(data),
        }
        return order.model_copy(update=changes)

    def _newest(self) -> str:
        newest = self.latest_checkpoint
        if newest is None:
            raise CheckpointError(
                f"there is no checkpoint in {self._order.checkpoints} yet; let the run end first"
            )
        return newest


class Background:
    """A run's work on a thread of its own. A program that comes to its end meanwhile waits for it.

    Args:
        work: the work; told what to ask whether it should stop.
    """

    def __init__(self, work: Callable[[Callable[[], bool]], None]) -> None:
        self._stop, self._done = threading.Event(), threading.Event()
        self._error: BaseException | None = None
        atexit.register(self._outlast_the_program)
        threading.Thread(target=self._do, args=(work,), name="mpsdk run", daemon=True).start()

    def join(self) -> None:
        """Return when the work is done; raises the error that ended it. On Ctrl-C the work is asked to stop."""
        try:
            # Not `join`: until Python 3.13 a thread whose join is interrupted counts as ended (python/cpython#90882),
            # and the program would leave without it.
            self._done.wait()
        except KeyboardInterrupt:
            self._ask_to_stop()
            raise
        if self._error is not None:
            raise self._error

    def _outlast_the_program(self) -> None:
        """At the program's end, wait for the work; a program that Ctrl-C ended, wherever it was, stops it first."""
        if getattr(sys, "last_type", None) is KeyboardInterrupt and not self._done.is_set():
            self._ask_to_stop()
        self._done.wait()

    def _ask_to_stop(self) -> None:
        if not self._stop.is_set():
            self._stop.set()
            text = "\ninterrupted; the run stops at one of its next logging steps, with a checkpoint"
            print(text, flush=True)

    def _do(self, work: Callable[[Callable[[], bool]], None]) -> None:
        try:
            work(self._stop.is_set)
        except BaseException as error:
            self._error = error
        finally:
            self._done.set()
            atexit.unregister(self._outlast_the_program)


def draw_pictures(run: Run) -> None:
    """The loss over the run, and the schedule where there is a pipeline, as PNG and SVG in the run's `pictures`; beside
    the traces of each profiled step, what ran when."""
    from mpsdk.report.pictures import loss_curve
    from mpsdk.report.timeline import draw_profile, has_actions
    from mpsdk.schedule.draw import draw

    folder = run.output_dir / PICTURES
    folder.mkdir(parents=True, exist_ok=True)
    plan = run.plan
    if run.history:
        loss_curve(run.history, folder / "loss.png", title=plan.description.name)
    if plan.degrees.pp > 1 and len(plan.stages) * plan.microbatches <= LARGEST_PICTURE:
        timeline = plan_timeline(plan)
        for suffix in (".png", ".svg"):
            draw(timeline, folder / f"schedule{suffix}")
    for directory in run.profiles:
        drawn = (directory / PICTURE).exists()  # in an earlier start of the run
        if not drawn and has_actions(directory):
            draw_profile(directory)


def _no_answer(event: dict[str, Any]) -> None:
    """Takes the events of an evaluation, whose one result every rank has itself."""
