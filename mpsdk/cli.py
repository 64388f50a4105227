"""The command line: the objects of the Python API, and nothing of its own.

Each command imports what it needs, so that `mpsdk --help` is quick and `mpsdk plan` imports no framework.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mpsdk import __version__
from mpsdk.cli_checkpoint import checkpoint_app
from mpsdk.errors import ConfigError, MpsdkError, Problem

if TYPE_CHECKING:
    from mpsdk.estimate import Estimate
    from mpsdk.estimator import Estimator

WRONG_CONFIGURATION = 2  # the exit code, which is also that of a wrong option
FAILED = 1

app = typer.Typer(
    name="mpsdk",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(checkpoint_app, name="checkpoint")

JobFile = Annotated[
    str, typer.Argument(metavar="JOB", help="The job file, YAML or JSON.", show_default=False)
]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command that `arguments` say, by default the process's own, and exit.

    An error that mpsdk raises on purpose is shown without a traceback.
    """
    try:
        app(args=None if arguments is None else list(arguments), prog_name="mpsdk")
    except MpsdkError as error:
        typer.echo(str(error), err=True)
        sys.exit(WRONG_CONFIGURATION if isinstance(error, ConfigError) else FAILED)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"mpsdk {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print the version of mpsdk."),
    ] = False,
) -> None:
    """Train one model on many processes: a job file says how it is spread, a plan says what that comes to."""


# -- plan and run ------------------------------------------------------------------------------------------------------


def _in_existing_folder(path: Path | None) -> Path | None:
    if path is not None and not path.absolute().parent.is_dir():
        raise typer.BadParameter(f"there is no directory {path.parent}")
    return path


def _picture(path: Path | None) -> Path | None:
    if path is not None and path.suffix not in (".svg", ".png"):
        raise typer.BadParameter(f"{path.name} must end in .svg or .png")
    return _in_existing_folder(path)


@app.command()
def plan(
    job: JobFile,
    world_size: Annotated[
        int | None,
        typer.Option(help="Ranks to plan for; by default as many as would be started here."),
    ] = None,
    as_json: Annotated[
        bool,
        typer.Option(
            "--json", help="Print the plan as JSON instead of a table; with --device, plan and estimate."
        ),
    ] = False,
    save: Annotated[
        Path | None, typer.Option(help="Write the plan there, as JSON.", callback=_in_existing_folder)
    ] = None,
    schedule_picture: Annotated[
        Path | None, typer.Option(help="Draw the pipeline schedule there, as SVG or PNG.", callback=_picture)
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(
            help="What the ranks run on: a100, h100, h200, laptop, or a file of measured figures. Adds whether the plan "
            "fits and how long a step takes. gpu or cpu: the kind only; by default the kind that is here.",
            show_default=False,
        ),
    ] = None,
    compare: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE",
            help="A distribution file in place of the job's own, or another job file, to put beside it. May be repeated.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Show what a job comes to. Starts no process and imports no framework."""
    from mpsdk.estimator import Estimator
    from mpsdk.report.plan_table import plan_text

    if compare and (save is not None or schedule_picture is not None):
        raise typer.BadParameter(
            "--save and --schedule-picture are of one plan; leave them out, or --compare"
        )
    estimator = Estimator.from_file(job)
    if compare:
        _compare(job, estimator, compare, world_size, device, as_json)
        return
    planned = estimator.plan(world_size=world_size)
    if not as_json:
        print(plan_text(planned, device or estimator.device(world_size)))
    elif device is None:
        print(planned.to_json())
    else:
        both = {"plan": planned.model_dump(mode="json"), "estimate": _verdict(planned.estimate(device))}
        print(json.dumps(both, indent=1))
    if save is not None:
        planned.save(save)
    if schedule_picture is not None:
        from mpsdk.report.plan_table import plan_timeline
        from mpsdk.schedule.draw import draw

        draw(plan_timeline(planned), schedule_picture)


def _verdict(estimate: Estimate) -> dict[str, object]:
    """Bytes of the fullest rank; whether it fits and how long a step takes, null for a device without figures."""
    timed = estimate.figures is not None
    return {
        "device": estimate.figures.name if estimate.figures else estimate.device,
        "peak": estimate.fullest.peak,
        "fits": bool(estimate.fits()) if timed else None,
        "step_time": estimate.step_time().to_dict() if timed else None,
    }


def _compare(
    job: str,
    estimator: Estimator,
    files: Sequence[str],
    world_size: int | None,
    device: str | None,
    as_json: bool,
) -> None:
    from mpsdk.config.files import read_file
    from mpsdk.estimator import Estimator
    from mpsdk.report.compare import compare

    def layout(file: str) -> Estimator | str:
        """A job file says which model; a distribution file doesn't."""
        content = read_file(file, root="compare").content
        return Estimator.from_file(file) if isinstance(content, dict) and "model" in content else file

    names = [Path(job).stem, *(Path(file).stem for file in files)]
    if len({*names}) < len(names):
        names = [job, *files]
    others = {name: layout(file) for name, file in zip(names[1:], files, strict=True)}
    found = compare(estimator, others, world_size=world_size, device=device, name=names[0])
    print(json.dumps(found.to_dict(), indent=1) if as_json else found)


@app.command()
def run(
    job: JobFile,
    resume: Annotated[
        str | None,
        typer.Option(
            help="auto: from the newest checkpoint that verifies, if there is one; never; or a checkpoint's path. "
            "By default as the job file says.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Train as a job file says. Under torchrun and the like, works as one of the processes that are there."""
    from mpsdk.estimator import Estimator

    if Path(job).suffix == ".py":
        remedy = "training scripts of your own can't be run yet; give a job file, .yaml or .json"
        raise ConfigError([Problem("job", job, remedy)], where="the command line")
    Estimator.from_file(job).fit(resume=resume)


# -- schema ------------------------------------------------------------------------------------------------------------


class Part(StrEnum):
    """What there is a schema of."""

    DISTRIBUTION = "distribution"
    TRAINING = "training"
    JOB = "job"


@app.command()
def schema(
    part: Annotated[Part, typer.Argument(help="Of which file.")] = Part.JOB,
) -> None:
    """Print the JSON schema of a file, with which an editor completes and checks it."""
    from mpsdk.config import Distribution, Job, Training

    documents = {Part.DISTRIBUTION: Distribution, Part.TRAINING: Training, Part.JOB: Job}
    print(json.dumps(documents[part].json_schema(), indent=2))


if __name__ == "__main__":
    main()
