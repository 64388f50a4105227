"""Estimator: the facade. Which model, how it is spread, how it is trained; then `plan` it, or `fit` it."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from mpsdk.arguments import (
    callback_problems,
    collect,
    done_step_problems,
    entry_point_problems,
    framework_problems,
    launcher_argument,
    model_argument,
    profile_argument,
    profile_problems,
)
from mpsdk.backend import Place
from mpsdk.config import Data, Distribution, Job, Profile, Training
from mpsdk.description import ModelDescription
from mpsdk.errors import CheckpointError, ConfigError, Problem
from mpsdk.factory import Factory, describe
from mpsdk.families.describe import describe_spec
from mpsdk.families.read import ReadModel, read_model
from mpsdk.families.spec import TransformerSpec
from mpsdk.inputs import Inputs, Preparation, read_inputs, tokenizer_problems
from mpsdk.launch import Launcher, LocalLauncher, get_launcher, place_from_environment
from mpsdk.launch.local import alone_in, visible_gpus
from mpsdk.plan import Plan
from mpsdk.resolve import resolve
from mpsdk.resume import AUTO, expected_checkpoint
from mpsdk.run import DATA_CACHE, Background, Run, draw_pictures
from mpsdk.work_order import JOB_FILE, WorkOrder

if TYPE_CHECKING:
    from mpsdk.report.callbacks import Callback
    from mpsdk.report.reporter import Reporter

Model = str | os.PathLike[str] | Mapping[str, object] | TransformerSpec | Callable[[], object]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, init=False, eq=False)
class Estimator:
    """A job: a model, its distribution, its training. Arguments are checked at once and never change.

    >>> estimator = Estimator({"model_type": "gpt2", "n_layer": 2}, training={"tokenizer": "bytes"})
    >>> estimator.plan(world_size=1).world_size
    1

    Args:
        model: a directory with a Hugging Face config.json (its weights are where training starts, if it has any); the
            fields of such a config, with `model_type`; a `TransformerSpec`; a model's name on the Hugging Face hub; for
            TensorFlow, a callable that makes a Keras model, or "package.module:callable": see `mpsdk_tf.keras_model`.
        entry_point: a training script of your own, instead of a model. Not there yet.
        framework: "torch" or "tensorflow".
        distribution: a `Distribution`, a dict, or the path of a file.
        training: a `Training`, a dict, or the path of a file.
        launcher: where the workers run: "local", or a launcher object such as `LocalLauncher(processes=4)`. Without effect
            where a launcher such as torchrun has started this process.
        output_dir: everything that a run leaves: history, checkpoints, logs, pictures, prepared data.
        callbacks: `mpsdk.report.callbacks.Callback` objects, told of a run's progress in this process.
        hyperparameters: arguments of the `entry_point`.
        profile: steps to trace and time, counted from 1 as in the history: a `Profile`, a dict such as
            `{"steps": [3, 4], "ranks": [0, 2]}`, a step or a list of them. What is learned stays the same, bit for bit.

    Raises:
        ConfigError: lists every problem of the arguments.
    """

    model: Model
    framework: str
    distribution: Distribution
    training: Training
    launcher: Launcher
    output_dir: Path
    callbacks: tuple[Callback, ...]
    profile: Profile
    _read: ReadModel | Factory
    _job: Job | None  # the file that it was made of: what `fit` takes where it isn't told otherwise

    def __init__(
        self,
        model: Model | None = None,
        *,
        entry_point: str | None = None,
        framework: str = "torch",
        distribution: Distribution | Mapping[str, object] | str | os.PathLike[str] | None = None,
        training: Training | Mapping[str, object] | str | os.PathLike[str] | None = None,
        launcher: str | Launcher = "local",
        output_dir: str | os.PathLike[str] = "runs/default",
        callbacks: Sequence[Callback] = (),
        hyperparameters: Mapping[str, object] | None = None,
        profile: Profile | Mapping[str, object] | int | Sequence[int] | None = None,
    ) -> None:
        problems = [
            *entry_point_problems(model, entry_point, hyperparameters or {}),
            *framework_problems(framework),
            *callback_problems(callbacks),
        ]
        spread = collect(problems, lambda: Distribution.parse(distribution or {}))
        how = collect(problems, lambda: Training.parse(training or {}), prefix="training.")
        read = None if model is None else collect(problems, lambda: model_argument(model, framework, how))
        where = collect(problems, lambda: launcher_argument(launcher))
        measured = collect(problems, lambda: profile_argument(profile), prefix="profile.")
        if problems:
            raise ConfigError(problems, where="the estimator")
        values = {
            "model": model,
            "framework": framework,
            "distribution": spread,
            "training": how,
            "launcher": where,
            "output_dir": Path(output_dir),
            "callbacks": tuple(callbacks),
            "profile": measured,
            "_read": read,
            "_job": None,
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)

    @classmethod
    def from_file(cls, path: str | os.PathLike[str], *, callbacks: Sequence[Callback] = ()) -> Estimator:
        """The estimator of a job file, as `mpsdk run` reads it; `fit()` then takes data and `resume` from there too.

        Raises ConfigError listing every problem.
        """
        job = Job.from_file(path)
        launch = job.launcher
        estimator = cls(
            job.model,
            entry_point=job.entry_point,
            framework=job.framework,
            distribution=job.distribution,
            training=job.training,
            launcher=get_launcher(launch.name, processes=launch.processes, timeout=launch.timeout),
            output_dir=job.output_dir,
            callbacks=callbacks,
            profile=job.profile,
        )
        object.__setattr__(estimator, "_job", job)
        return estimator

    def with_distribution(
        self, distribution: Distribution | Mapping[str, object] | str | os.PathLike[str]
    ) -> Estimator:
        """The same job, spread another way. Raises ConfigError listing every problem."""
        problems: list[Problem] = []
        spread = collect(problems, lambda: Distribution.parse(distribution))
        if problems:
            raise ConfigError(problems, where="the distribution")
        other = copy(self)
        object.__setattr__(other, "distribution", spread)
        return other

    # -- plan -------------------------------------------------------------------------------------------------------

    def plan(self, world_size: int | None = None) -> Plan:
        """What the job becomes on `world_size` ranks. Starts no process and imports no framework; a model of your own is
        made once in a process beside this one, to be described.

        Args:
            world_size: None: as many as a launcher has started already, or as `launcher` would start.

        Raises:
            ConfigError: lists every problem of the job on that many ranks.
        """
        problems: list[Problem] = []
        ranks = self._world_size() if world_size is None else world_size
        if ranks < 1:
            raise ConfigError([Problem("world_size", ranks, "must be at least 1")], where="the plan")
        plan = collect(
            problems,
            lambda: resolve(
                self.distribution,
                self._description,
                self.training,
                world_size=ranks,
                framework=self.framework,
            ),
        )
        problems += profile_problems(self.profile, self.training.steps, ranks)
        problems += tokenizer_problems(self.training, self._model_directory, self._description.vocab_size)
        if plan is None or problems:
            raise ConfigError(problems, where=f"the plan for {ranks} rank{'s' if ranks != 1 else ''}")
        return plan

    def _world_size(self) -> int:
        place = place_from_environment()
        return place.world_size if place else self.launcher.world_size(self.distribution.stated_degree)

    def device(self, world_size: int | None = None) -> Literal["gpu", "cpu"]:
        """The kind of device that `world_size` ranks would run on, as far as can be known here.

        "cpu" where the ranks would run on this machine, or do so already, and it has no GPU; else "gpu".
        """
        here = place_from_environment() is not None or isinstance(self.launcher, LocalLauncher)
        if not here or (world_size is not None and world_size != self._world_size()):
            return "gpu"
        return "gpu" if visible_gpus() else "cpu"

    @cached_property
    def _description(self) -> ModelDescription:
        if isinstance(self._read, Factory):
            length = self.training.sequence_length
            return describe(self._read._replace(sequence_length=length), self.framework)
        return describe_spec(self._read.spec)

    @property
    def _model_directory(self) -> str | None:
        if isinstance(self._read, Factory) or self._read.directory is None:
            return None
        return str(self._read.directory.resolve())

    # -- fit --------------------------------------------------------------------------------------------------------

    def fit(
        self, train: object = None, validation: object = None, *, resume: str | None = None, wait: bool = True
    ) -> Run:
        """Train, and give back what came of it.

        Under a launcher that has started the processes already (RANK and WORLD_SIZE are set), every one of them calls this
        and works as a rank; nothing is spawned, and rank 0 prepares the data and runs the callbacks.

        Args:
            train: files, a Hugging Face dataset, rows or token ids; or `{"train": ..., "validation": ...}`. None: as the job
                file says.
            validation: the same, or a number such as 0.1: that share of the training data is held out.
            resume: "auto": from the newest checkpoint of this run of which every byte is right, else from the beginning.
                "never": from the beginning, refused where the run has checkpoints already, since nothing is deleted unasked.
                A path: from that checkpoint, also another run's; refused where this run has newer ones. None: as the job file
                says, else "auto". A run that has all its steps already says so and trains nothing.
            wait: False comes back at once; `run.wait()` waits.

        Raises:
            ConfigError: lists every problem of the job or of the data's arguments.
            DataError: the data can't be used.
            CheckpointError: the checkpoint to resume from is damaged or doesn't fit the model.
            WorkerError: a worker failed, was killed or hung; the root cause comes first.
        """
        job_data = self._job.data if self._job else Data()
        inputs = read_inputs(
            job_data.train if train is None else train,
            validation if validation is not None or train is not None else job_data.validation,
        )
        resume = resume or (self._job.resume if self._job else "auto")
        place = place_from_environment()
        if place is not None:
            return self._fit_in_place(place, inputs, resume)
        order = self._order(resume)
        run = Run(self.output_dir, launcher=self.launcher)
        with alone_in(self.output_dir):  # a run that is under way there keeps its job
            if self._is_finished(order):
                return run
            order = self._announced(order, inputs)
            path = order.save(self.output_dir / JOB_FILE)

        def work(stop: Callable[[], bool]) -> None:
            self._launch(path, order.plan.world_size, stop)

        if not wait:
            return Run(self.output_dir, launcher=self.launcher, ending=Background(work))
        work(lambda: False)
        return run

    def _order(self, resume: str) -> WorkOrder:
        """All of the order but the data. What can go wrong before a worker starts goes wrong here."""
        plan = self.plan()
        try:
            self.output_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            problem = Problem("output_dir", str(self.output_dir), f"can't be made: {error.strerror}")
            raise ConfigError([problem], where="the run") from None
        order = WorkOrder(
            mode="train",
            plan=plan,
            output_dir=str(self.output_dir.resolve()),
            resume=resume,
            profile=self.profile,
            **self._model_in_order(),
        )
        checkpoint = expected_checkpoint(order)
        if checkpoint is None:
            order.initial_weights()
        elif problems := done_step_problems(self.profile, self.output_dir, plan.world_size, checkpoint.step):
            raise ConfigError(problems, where="the run")
        return order

    def _model_in_order(self) -> dict[str, Any]:
        """The fields of an order that say where the model comes from."""
        from mpsdk.families.hf import has_weights

        read, model = self._read, cast("object", self.model)
        if isinstance(read, Factory):
            return {"import_from": read.directory}
        if isinstance(model, (str, os.PathLike)):
            # Again, for the weights of a model on the hub, which `plan` does without.
            directory = read_model(
                os.fspath(cast("str | os.PathLike[str]", model)), objective=self.training.objective
            ).directory
            read = read._replace(directory=directory)
        return {
            "model_directory": None if read.directory is None else str(read.directory.resolve()),
            "pretrained": read.directory is not None and has_weights(read.directory),
            "hf_config": read.hf_config,
        }

    def _is_finished(self, order: WorkOrder) -> bool:
        """Whether the run has done all its steps before; says so then. Damaged checkpoints the workers pass over."""
        checkpoint = expected_checkpoint(order) if order.resume == AUTO else None
        steps = self.training.steps
        if checkpoint is None or checkpoint.step < steps or not (self.output_dir / JOB_FILE).is_file():
            return False
        try:
            checkpoint.verify()
        except CheckpointError:
            return False
        print(
            f"nothing to train: {self.output_dir} is at step {checkpoint.step:,} already, of {steps:,} "
            f"(checkpoint {checkpoint.path}).\nTo go on, raise training.steps; to start over, choose another output_dir."
        )
        return True

    def _announced(self, order: WorkOrder, inputs: Inputs) -> WorkOrder:
        """`order` with its data, which may take a while to prepare; prints the plan before, and how much there is after."""
        from mpsdk.report.plan_table import plan_text

        plan = order.plan
        print(plan_text(plan, self.device(plan.world_size)), end="\n\n", flush=True)
        train, validation = Preparation(order, self.output_dir / DATA_CACHE).of(inputs)
        length = self.training.sequence_length
        samples = f"{len(train.open(length)):,} samples of {length:,} tokens to train on"
        if validation is not None:
            samples += f", {len(validation.open(length)):,} to validate on"
        print(f"{samples}; all of the run is kept in {self.output_dir}", flush=True)
        return order.model_copy(update={"train": train, "validation": validation})

    def _launch(self, path: Path, world_size: int, stop: Callable[[], bool]) -> None:
        from mpsdk.report.reporter import Reporter

        reporter = Reporter(self.output_dir, self.callbacks)

        def on_event(event: dict[str, Any]) -> object:
            answer = _report(reporter, event)
            return "stop" if stop() else answer

        print(f"starting {world_size} worker{'s' if world_size != 1 else ''} …", flush=True)
        try:
            self.launcher.run(path, world_size=world_size, run_directory=self.output_dir, on_event=on_event)
        except (KeyboardInterrupt, SystemExit):
            reporter.close()
            newest = Run(self.output_dir).latest_checkpoint
            what = f"; run it again to go on from {newest}" if newest else " before the first checkpoint"
            print(f"interrupted{what}", flush=True)
            raise
        finally:
            reporter.close()
        draw_pictures(Run(self.output_dir))

    def _fit_in_place(self, place: Place, inputs: Inputs, resume: str) -> Run:
        from mpsdk.in_place import work_in_place
        from mpsdk.report.reporter import Reporter

        reporter = Reporter(self.output_dir, self.callbacks) if place.rank == 0 else None

        def emit(event: dict[str, Any]) -> object:
            return _report(reporter, event) if reporter else None

        with ExitStack() as stack:
            if reporter:
                stack.callback(reporter.close)

            def order() -> WorkOrder:
                order = self._order(resume)
                stack.enter_context(alone_in(self.output_dir))
                order = self._announced(order, inputs)
                order.save(self.output_dir / JOB_FILE)
                return order

            work_in_place(place, str(self.output_dir), order, emit)
        run = Run(self.output_dir, launcher=self.launcher)
        if place.rank == 0:
            draw_pictures(run)
        return run


def _report(reporter: Reporter, event: dict[str, Any]) -> object:
    for warning in event.pop("warnings", ()):
        _log.warning(warning)
    return reporter.handle(event)
