"""`mpsdk checkpoint`: look at checkpoints, verify them, convert them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mpsdk.errors import CheckpointError

if TYPE_CHECKING:
    from mpsdk.checkpoint import Checkpoint, Summary

checkpoint_app = typer.Typer(
    help="Look at checkpoints, check every byte of them, convert them.", no_args_is_help=True
)

CheckpointPath = Annotated[
    str,
    typer.Argument(
        metavar="PATH",
        help="A checkpoint, a directory of checkpoints, or a run's output directory.",
        show_default=False,
    ),
]


@checkpoint_app.command()
def inspect(
    path: CheckpointPath,
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor of a checkpoint.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False,
) -> None:
    """Show what a checkpoint holds, or which checkpoints a directory holds. Reads manifests only."""
    from mpsdk.checkpoint import Checkpoint

    inside = _checkpoints_in(path)
    if inside and not tensors:
        opened, failures = _open_all(inside)
        summaries = [checkpoint.describe() for checkpoint in opened]
        if as_json:
            print(json.dumps([summary.model_dump(mode="json") for summary in summaries], indent=1))
        else:
            _print_checkpoints(summaries)
        _fail_with(failures)
        return
    checkpoint = Checkpoint.open(path)
    summary = checkpoint.describe()
    shapes = {slot: checkpoint.shapes(slot) for slot in summary.slots}
    if as_json:
        print(json.dumps(summary.model_dump(mode="json") | ({"shapes": shapes} if tensors else {}), indent=1))
        return
    print(summary)
    if tensors:
        print()
        _print_shapes(shapes)


@checkpoint_app.command()
def verify(path: CheckpointPath) -> None:
    """Check every byte of a checkpoint, or of all in a directory. The exit code is 1 when one is damaged."""
    opened, failures = _open_all(_checkpoints_in(path) or [path])
    for checkpoint in opened:
        try:
            checkpoint.verify()
        except CheckpointError as error:
            failures.append(error)
        else:
            print(f"{checkpoint.path}: intact")
    _fail_with(failures)


@checkpoint_app.command()
def convert(
    source: Annotated[
        str,
        typer.Argument(
            help="A checkpoint (or a directory of them, or a run's: the newest), or a Hugging Face directory.",
            show_default=False,
        ),
    ],
    target: Annotated[str, typer.Argument(help="The directory to make.", show_default=False)],
    config: Annotated[
        str | None,
        typer.Option(
            help="To Hugging Face: a directory whose config.json and tokenizer files are taken along. By default what is "
            "known of where the model came from.",
            show_default=False,
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="To Hugging Face: float32, bfloat16 or float16. By default float32.", show_default=False
        ),
    ] = None,
    max_shard_bytes: Annotated[
        int | None,
        typer.Option(
            help="To Hugging Face: above this, the weights go to several files. By default 2 GiB.",
            show_default=False,
        ),
    ] = None,
    objective: Annotated[
        str | None,
        typer.Option(
            help="From Hugging Face: what the model's head is for, such as sequence-classification. By default as the "
            "configuration says.",
            show_default=False,
        ),
    ] = None,
    labels: Annotated[
        int | None,
        typer.Option(
            help="From Hugging Face: how many classes a classifier has. By default as the configuration says.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Write a checkpoint as a Hugging Face directory, or the other way round. Needs no framework and little memory."""
    from mpsdk.checkpoint import convert as convert_checkpoint

    made = convert_checkpoint(
        source,
        target,
        config=config,
        dtype=dtype,  # pyright: ignore[reportArgumentType]
        max_shard_bytes=max_shard_bytes,
        objective=objective,  # pyright: ignore[reportArgumentType]
        labels=labels,
    )
    print(f"made {made}")


def _checkpoints_in(path: str) -> list[str]:
    """The checkpoints in `path`, or those of the run whose output directory it is; none where it may be one itself."""
    from mpsdk.checkpoint import find
    from mpsdk.checkpoint.storage import is_remote
    from mpsdk.run import Run
    from mpsdk.work_order import JOB_FILE

    if is_remote(path):
        return find(path)
    if not Path(path).exists():
        raise CheckpointError(f"there is nothing at {Path(path).absolute()}")
    if not Path(path, JOB_FILE).is_file():
        return find(path)
    checkpoints = Run.load(path).checkpoints
    if not checkpoints:
        raise CheckpointError(f"the run in {Path(path).absolute()} has no checkpoint yet")
    return checkpoints


def _open_all(paths: Iterable[str]) -> tuple[list[Checkpoint], list[CheckpointError]]:
    """Those that can be opened, and why the others can't: one bad checkpoint doesn't hide the rest."""
    from mpsdk.checkpoint import Checkpoint

    opened: list[Checkpoint] = []
    failures: list[CheckpointError] = []
    for path in paths:
        try:
            opened.append(Checkpoint.open(path))
        except CheckpointError as error:
            failures.append(error)
    return opened, failures


def _fail_with(failures: Sequence[CheckpointError]) -> None:
    if failures:
        raise CheckpointError("\n".join(str(failure) for failure in failures))


def _print_checkpoints(summaries: Iterable[Summary]) -> None:
    rows = (
        (
            summary.path,
            f"{summary.step:,}",
            f"{summary.samples_consumed:,}",
            f"{summary.framework}, {' · '.join(f'{axis} {n}' for axis, n in summary.layout.items() if n > 1) or '1 rank'}",
            f"{summary.parameters:,}",
            f"{summary.bytes:,}",
        )
        for summary in summaries
    )
    _print_table(("checkpoint", "step", "samples", "written by", "parameters", "bytes"), rows, left=(0, 3))


def _print_shapes(shapes: Mapping[str, Mapping[str, tuple[int, ...]]]) -> None:
    """One row a tensor: its shape, and which slots hold it."""
    shape_of = {name: shape for of_slot in shapes.values() for name, shape in of_slot.items()}
    rows = (
        (name, " × ".join(map(str, shape)), ", ".join(slot for slot in shapes if name in shapes[slot]))
        for name, shape in shape_of.items()
    )
    _print_table(("tensor", "shape", "slots"), rows, left=(0, 2))


def _print_table(titles: Sequence[str], rows: Iterable[Sequence[str]], *, left: Sequence[int]) -> None:
    """A table as wide as it needs to be, so that a pipe gets whole lines. Columns `left` are aligned to the left."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for number, title in enumerate(titles):
        table.add_column(title, justify="left" if number in left else "right", no_wrap=True)
    for row in rows:
        table.add_row(*map(Text, row))
    console = Console()
    console.width = max(
        console.width, console.measure(table, options=console.options.update(max_width=10_000)).maximum
    )
    console.print(table)
