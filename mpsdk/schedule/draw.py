"""A picture of a timeline: a row for each rank, a bar for each action, grey where the rank is idle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mpsdk.errors import ScheduleError
from mpsdk.schedule.actions import Kind
from mpsdk.schedule.simulate import Timeline

Axes = Any  # matplotlib leaves its keyword arguments untyped, so strict checking ends at its objects
Colour = tuple[float, float, float]

# After Okabe and Ito, so that kinds stay apart for colour-blind readers too.
_LOOKS: dict[Kind, tuple[str, Colour]] = {
    Kind.FORWARD: ("forward", (0.55, 0.77, 0.93)),
    Kind.BACKWARD: ("backward", (0.96, 0.68, 0.42)),
    Kind.BACKWARD_INPUT: ("backward, input", (0.96, 0.68, 0.42)),
    Kind.BACKWARD_WEIGHT: ("backward, weights", (0.60, 0.83, 0.68)),
}
_IDLE = "#ececec"
_INK = "#222222"
_SUFFIXES = (".svg", ".png")
_STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],  # only one: SVG repeats the list in every piece of text
    "font.size": 9.0,
    "text.color": _INK,
    "svg.fonttype": "none",  # text stays text: smaller, and can be searched
    "svg.hashsalt": "mpsdk",
}
_LEFT, _RIGHT, _TOP, _BOTTOM = 0.75, 0.2, 0.45, 0.95  # margins in inches
_TALLEST, _SHORTEST, _ROWS = 0.42, 0.1, 14.0  # a row; all rows as long as they are not below the shortest
_NUMBER = 7.0  # size of a microbatch's number in points; a digit is 0.62 of it wide


def draw(timeline: Timeline, path: str | Path, *, width: float = 10.0) -> None:
    """Draw `timeline` into `path`, as SVG or PNG by its suffix.

    Bars carry the number of their microbatch where it fits; later stages of a rank are darker. The title gives the
    bubble in percent of all ranks' time. The same timeline always gives the same SVG.

    Args:
        timeline: what `simulate` returned.
        path: ends in .svg or .png.
        width: of the picture, in inches. The height follows from the number of ranks.

    Raises:
        ScheduleError: another suffix.
    """
    path = Path(path)
    if path.suffix not in _SUFFIXES:
        raise ScheduleError(
            f"{path.name}: a schedule is drawn as {' or '.join(_SUFFIXES)}, by the end of its name"
        )
    from matplotlib import rc_context  # pyright: ignore[reportUnknownVariableType]
    from matplotlib.figure import Figure

    ranks = len(timeline.spans)
    row = max(_SHORTEST, min(_TALLEST, _ROWS / ranks))
    height = _TOP + _BOTTOM + ranks * row
    inner = width - _LEFT - _RIGHT
    with rc_context(_STYLE):
        figure: Any = Figure(figsize=(width, height))
        axes = figure.add_axes((_LEFT / width, _BOTTOM / height, inner / width, ranks * row / height))
        _bars(axes, timeline, 72 * inner / (timeline.makespan or 1.0), 72 * row)
        _frame(axes, timeline, row)
        _legend(figure, timeline, height)
        figure.savefig(path, dpi=160, metadata={"Date": None} if path.suffix == ".svg" else None)


def _bars(axes: Axes, timeline: Timeline, unit: float, row: float) -> None:
    """The bars and their numbers; `unit` and `row` are the width of a unit of time and the height of a row in points."""
    virtual_stages = timeline.schedule.virtual_stages
    durations = [end - start for spans in timeline.spans for _, start, end in spans if end > start]
    edge = 0.6 if unit * min(durations, default=0.0) > 4 else 0.0
    for rank, spans in enumerate(timeline.spans):
        chunk_of = {stage: chunk for chunk, stage in enumerate(timeline.schedule.stages_of(rank))}
        axes.broken_barh([(0, timeline.makespan)], (rank + 0.04, 0.92), facecolor=_IDLE)
        places: dict[tuple[Kind, int], list[tuple[float, float]]] = {}
        for (kind, stage, microbatch), start, end in spans:
            chunk = chunk_of[stage]
            places.setdefault((kind, chunk), []).append((start, end - start))
            digits = 0.62 * _NUMBER * len(str(microbatch))
            if digits + 2 < (end - start) * unit and row > _NUMBER + 2:
                colour = _shade(_LOOKS[kind][1], chunk, virtual_stages)
                axes.text(
                    (start + end) / 2,
                    rank + 0.52,
                    str(microbatch),
                    fontsize=_NUMBER,
                    color="white" if _brightness(colour) < 0.5 else _INK,
                    horizontalalignment="center",
                    verticalalignment="center",
                )
        for (kind, chunk), bars in places.items():
            colour = _shade(_LOOKS[kind][1], chunk, virtual_stages)
            axes.broken_barh(bars, (rank + 0.04, 0.92), facecolor=colour, edgecolor="white", linewidth=edge)


def _frame(axes: Axes, timeline: Timeline, row: float) -> None:
    schedule, ranks = timeline.schedule, len(timeline.spans)
    axes.set_xlim(0, timeline.makespan or 1.0)
    axes.set_ylim(ranks, 0)
    every = max(1, round(0.14 / row))
    axes.set_yticks(
        [rank + 0.5 for rank in range(0, ranks, every)], [f"rank {rank}" for rank in range(0, ranks, every)]
    )
    axes.tick_params(length=0, colors=_INK)
    axes.tick_params(axis="x", length=3)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("time", color=_INK)
    virtual = f", {schedule.virtual_stages} stages a rank" if schedule.virtual_stages > 1 else ""
    sizes = f"{_count(ranks, 'rank')}{virtual}, {_count(schedule.microbatches, 'microbatch', 'es')}"
    title = f"{schedule.name}: {sizes}, bubble {100 * timeline.bubble_fraction:.1f} %"
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold", pad=8)


def _legend(figure: Any, timeline: Timeline, height: float) -> None:
    from matplotlib.patches import Patch

    patch: Any = Patch

    kinds = {span.action.kind for spans in timeline.spans for span in spans}
    virtual_stages = timeline.schedule.virtual_stages
    entries = [
        patch(facecolor=colour, label=label) for kind, (label, colour) in _LOOKS.items() if kind in kinds
    ]
    if virtual_stages > 1:
        darkest = _shade(_LOOKS[Kind.FORWARD][1], virtual_stages - 1, virtual_stages)
        entries.append(patch(facecolor=darkest, label="darker: a later stage of the rank"))
    entries.append(patch(facecolor=_IDLE, edgecolor="#d0d0d0", linewidth=0.5, label="idle"))
    figure.legend(
        handles=entries,
        loc="lower center",
        bbox_to_anchor=(0.5, 0.08 / height),
        ncols=min(len(entries), 7),
        frameon=False,
        handlelength=1.2,
        columnspacing=1.4,
    )


def _shade(colour: Colour, chunk: int, virtual_stages: int) -> Colour:
    """Darker for later stages of a rank, down to a bit more than half."""
    share = 1 - 0.42 * chunk / max(1, virtual_stages - 1)
    red, green, blue = colour
    return (red * share, green * share, blue * share)


def _brightness(colour: Colour) -> float:
    """How bright a colour looks, from 0 to 1 (ITU-R BT.601)."""
    red, green, blue = colour
    return 0.299 * red + 0.587 * green + 0.114 * blue


def _count(number: int, what: str, plural: str = "s") -> str:
    return f"{number} {what}{plural if number != 1 else ''}"
