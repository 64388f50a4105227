"""What the Estimator's arguments must be, each checked with the problem that it would be."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar, cast

from pydantic import ValidationError

from mpsdk.backend import limits_of
from mpsdk.config import Profile, Training, problems_of
from mpsdk.errors import ConfigError, Problem
from mpsdk.factory import FRAMEWORKS, NAME, Factory, factory_of
from mpsdk.families.heads import written_labels
from mpsdk.families.read import ReadModel, read_model
from mpsdk.families.spec import TransformerSpec
from mpsdk.launch import Launcher, get_launcher
from mpsdk.profile import is_measured, step_folder

T = TypeVar("T")


def collect(problems: list[Problem], make: Callable[[], T], *, prefix: str = "") -> T | None:
    """What `make` gives; None, with its problems added, where it raises ConfigError."""
    try:
        return make()
    except ConfigError as error:
        own = prefix.removesuffix(".")
        problems += [
            Problem(p.field if p.field == own else prefix + p.field, p.got, p.remedy) for p in error.problems
        ]
        return None


def model_argument(model: object, framework: str, training: Training | None) -> ReadModel | Factory:
    """The family, configuration and spec of `model`, without its weights; or the callable that makes it.

    `training`: whose objective chooses the head; None: there is none to go by, since it has problems of its own.
    """
    families = "give a Hugging Face directory or configuration of a known family, or a TransformerSpec"
    if isinstance(model, os.PathLike):
        model = os.fspath(cast("os.PathLike[str]", model))
    named = isinstance(model, str) and NAME.fullmatch(model) and not Path(model).exists()
    if named or (callable(model) and hasattr(model, "__qualname__")):
        if framework in FRAMEWORKS:
            return factory_of(cast("str | Callable[..., object]", model))
        what = model if named else repr(model)
        remedy = f"an importable callable can't be trained yet with framework {framework!r}; {families}"
        raise _refusal("model", what, remedy)
    if not isinstance(model, (str, Mapping, TransformerSpec)):
        kind = type(model).__name__
        if framework in FRAMEWORKS:
            families += ", or a callable that makes a model"
        raise _refusal("model", kind, f"an object of this type can't be trained yet; {families}")
    names = training.labels if training else None
    read = read_model(
        cast("str | Mapping[str, object] | TransformerSpec", model),
        objective=training.objective if training else None,
        labels=len(names) if names else None,
        weights=False,
    )
    if names:
        read.hf_config.update(written_labels(names))
    try:
        return read._replace(hf_config=json.loads(json.dumps(read.hf_config)))
    except (TypeError, ValueError) as error:
        raise _refusal("model", "a configuration", f"must be plain JSON data: {error}") from None


def launcher_argument(launcher: object) -> Launcher:
    if not isinstance(launcher, (str, Launcher)):
        remedy = 'must be the name of a launcher, such as "local", or an object with world_size() and run()'
        raise _refusal("launcher", launcher, remedy)
    return get_launcher(launcher)


def profile_argument(profile: object) -> Profile:
    try:
        return Profile.model_validate(profile)
    except ValidationError as error:
        raise ConfigError(problems_of(error, root="profile")) from None


def profile_problems(profile: Profile, steps: int, world_size: int) -> list[Problem]:
    """What of `profile` a run of `steps` steps on `world_size` ranks can't do."""
    problems: list[Problem] = []
    late = [step for step in profile.steps or () if step > steps]
    if late:
        remedy = f"names {_listed(late)}, and training.steps is {steps}; name steps from 1 to {steps}"
        problems.append(Problem("profile.steps", list(profile.steps or ()), remedy))
    outside = [] if profile.ranks == "all" else [rank for rank in profile.ranks if rank >= world_size]
    if outside:
        world = f"{world_size} rank{'s' if world_size > 1 else ''}"
        remedy = f'names {_listed(outside)}, and there are {world}; name ranks from 0 to {world_size - 1}, or "all"'
        problems.append(Problem("profile.ranks", list(profile.ranks), remedy))
    return problems


def done_step_problems(profile: Profile, output_dir: Path, world_size: int, done: int) -> list[Problem]:
    """The steps of `profile` that a run never comes to that goes on after step `done`, and has not measured before."""
    ranks = range(world_size) if profile.ranks == "all" else profile.ranks
    missed = [
        step
        for step in profile.steps or ()
        if step <= done and not is_measured(step_folder(output_dir, step), ranks)
    ]
    if not missed:
        return []
    remedy = (
        f"names {_listed(missed)}, and the run goes on after step {done}, with which that is done; name later steps, "
        "leave profile out, or choose another output_dir"
    )
    return [Problem("profile.steps", list(profile.steps or ()), remedy)]


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, sorted(numbers)))


def _refusal(field: str, got: object, remedy: str) -> ConfigError:
    return ConfigError([Problem(field, got, remedy)])


def entry_point_problems(
    model: object, entry_point: object, hyperparameters: Mapping[str, object]
) -> list[Problem]:
    problems: list[Problem] = []
    if model is None and entry_point is None:
        problems.append(Problem("model", None, "is missing; give a model"))
    if entry_point is not None:
        remedy = "training scripts of your own can't be run yet; give a model instead"
        problems.append(Problem("entry_point", entry_point, remedy))
    if hyperparameters and entry_point is None:
        remedy = "are arguments of an entry_point; a model's training is described by training"
        problems.append(Problem("hyperparameters", sorted(hyperparameters), remedy))
    return problems


def framework_problems(framework: str) -> list[Problem]:
    if limits_of(framework) is not None:
        return []
    return [Problem("framework", framework, "no backend of that name is installed")]


def callback_problems(callbacks: Sequence[object]) -> list[Problem]:
    from mpsdk.report.callbacks import Callback

    remedy = "must be an object of a class derived from mpsdk.report.callbacks.Callback"
    return [
        Problem(f"callbacks.{number}", callback, remedy)
        for number, callback in enumerate(callbacks)
        if not isinstance(callback, Callback)
    ]
