"""The picture of a profiled step: what each rank did when, above what the simulator makes of the same costs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any

from mpsdk.errors import DataError
from mpsdk.plan import Plan
from mpsdk.profile import (
    PICTURE,
    PLAN_FILE,
    REDUCTION,
    SENDS,
    TOKEN_COUNT,
    UPDATE,
    WAIT,
    MeasuredSpan,
    RankSpans,
    measured_ranks,
    spans_path,
)
from mpsdk.schedule import COMPUTE, Action, Costs, Kind, Schedule, Span, Timeline, simulate
from mpsdk.schedule.draw import (
    IDLE,
    INK,
    RIGHT,
    STYLE,
    TITLE,
    frame,
    legend,
    paint_bars,
    row_height,
)

_COSTS = {
    "forward": Kind.FORWARD,
    "backward": Kind.BACKWARD,
    "backward_input": Kind.BACKWARD_INPUT,
    "backward_weight": Kind.BACKWARD_WEIGHT,
}
_COMPUTE = {kind.value for kind in COMPUTE}
_WAITS = (WAIT, SENDS)
_PHASES = (TOKEN_COUNT, REDUCTION, UPDATE)
_PHASE_COLOUR = (0.84, 0.72, 0.84)
_WAIT_LOOK: dict[str, Any] = {
    "facecolor": "white",
    "edgecolor": "#b9b9b9",
    "hatch": "//////",
    "linewidth": 0.0,
}
_CAPTION_LOOK: dict[str, Any] = {"fontsize": 8, "linespacing": 1.4, "color": "#555555"}
_MILLISECONDS = 1000.0

_LEFT = 1.15  # margin in inches, for labels such as `rank 12 (pp 3)`
_TOP, _BETWEEN = 0.8, 0.6  # inches: the titles above the panels, and between the panels
_EDGE = 0.4  # points: the line between bars, thin enough to leave something of short ones
_LEGEND, _LINE = 0.35, 0.16  # inches: the row with the legend, a line of the text below it


@dataclass(frozen=True)
class ProfiledStep:
    """What was measured of a step, in milliseconds since its ranks left the barrier before it.

    Microbatches are numbered over all the passes that accumulation makes.
    """

    number: int
    plan: Plan
    measured: tuple[RankSpans, ...]

    @classmethod
    def load(cls, directory: str | Path) -> ProfiledStep:
        """The step whose profile is in `directory`. Raises DataError when no rank has left spans there."""
        folder = Path(directory)
        ranks = measured_ranks(folder)
        if not ranks:
            raise DataError(f"{folder} holds no profile: it has no spans of any rank")
        plan = Plan.load(folder / PLAN_FILE)
        measured = tuple(RankSpans.load(spans_path(folder, rank)) for rank in ranks)
        return cls(int(folder.name.removeprefix("step-")), plan, measured)

    @property
    def ranks(self) -> tuple[int, ...]:
        return tuple(rank.rank for rank in self.measured)

    @cached_property
    def _zero(self) -> dict[str, float]:
        """When the barrier opened, by each machine's clock: no rank left it before that, the first one just then."""
        machines = {rank.machine for rank in self.measured}
        return {
            machine: min(rank.met for rank in self.measured if rank.machine == machine)
            for machine in machines
        }

    def _placed(self, kinds: Iterable[str]) -> list[list[tuple[MeasuredSpan, float, float]]]:
        """Of each rank, its spans of `kinds` with their start and end."""
        wanted = set(kinds)
        return [
            [
                (
                    span,
                    (span.start - self._zero[rank.machine]) * _MILLISECONDS,
                    (span.end - self._zero[rank.machine]) * _MILLISECONDS,
                )
                for span in rank.spans
                if span.kind in wanted
            ]
            for rank in self.measured
        ]

    @cached_property
    def executed(self) -> list[list[Span]]:
        """The compute actions of each rank that was measured."""
        return [
            [Span(self._action(span), start, end) for span, start, end in rank]
            for rank in self._placed(_COMPUTE)
        ]

    def _action(self, span: MeasuredSpan) -> Action:
        assert span.stage is not None and span.microbatch is not None
        return Action(
            Kind(span.kind), span.stage, span.microbatch + span.part * self.plan.schedule.microbatches
        )

    @cached_property
    def waits(self) -> list[list[tuple[float, float]]]:
        """Of each rank, start and end of waiting for messages."""
        return [[(start, end) for _, start, end in rank] for rank in self._placed(_WAITS)]

    @cached_property
    def phases(self) -> list[list[tuple[float, float]]]:
        """Of each rank, start and end of counting the tokens, of what is left of reducing gradients, and of the update."""
        return [[(start, end) for _, start, end in rank] for rank in self._placed(_PHASES)]

    @cached_property
    def pipeline(self) -> tuple[float, float]:
        """When the first action begins and the last one ends, of all that were measured."""
        spans = [(start, end) for rank in self.executed for _, start, end in rank]
        return min(start for start, _ in spans), max(end for _, end in spans)

    @property
    def makespan(self) -> float:
        start, end = self.pipeline
        return end - start

    @property
    def bubble_fraction(self) -> float:
        """The part of the measured ranks' time, within the makespan, in which they compute nothing."""
        busy = sum(end - start for rank in self.executed for _, start, end in rank)
        return 1 - busy / (self.makespan * len(self.executed))

    @cached_property
    def durations(self) -> dict[Kind, list[float | None]]:
        """Of each kind, the median duration at each stage; None where nothing was measured."""
        found: dict[tuple[Kind, int], list[float]] = {}
        for rank in self.executed:
            for (kind, stage, _), start, end in rank:
                found.setdefault((kind, stage), []).append(end - start)
        return {
            kind: [
                median(found[kind, stage]) if (kind, stage) in found else None
                for stage in range(self.plan.schedule.stages)
            ]
            for kind in sorted(COMPUTE)
        }

    @property
    def stages_not_measured(self) -> list[int]:
        return [stage for stage, duration in enumerate(self.durations[Kind.FORWARD]) if duration is None]

    @cached_property
    def simulated(self) -> Timeline:
        """All the passes of the step on paper, with the measured medians and with messages that take no time.

        A stage that no measured rank has costs as much as the median of the others.
        """
        costs = {name: _complete(self.durations[kind]) for name, kind in _COSTS.items()}
        passes = self.plan.training.accumulation
        return simulate(_repeated(self.plan.schedule, passes), Costs(**costs))


def _complete(durations: Sequence[float | None]) -> list[float]:
    known = [duration for duration in durations if duration is not None]
    middle = median(known) if known else 0.0
    return [middle if duration is None else duration for duration in durations]


def _repeated(schedule: Schedule, passes: int) -> Schedule:
    """`passes` passes over the schedule, one after another, as accumulation runs it; its microbatches numbered on."""
    count = schedule.microbatches
    actions = tuple(
        tuple(
            action._replace(microbatch=action.microbatch + number * count)
            for number in range(passes)
            for action in row
        )
        for row in schedule.actions
    )
    return replace(schedule, microbatches=count * passes, actions=actions)


def has_actions(directory: str | Path) -> bool:
    """Whether there is anything to draw of the step profiled in `directory`: one that was compiled whole has no actions."""
    folder = Path(directory)
    measured = (RankSpans.load(spans_path(folder, rank)) for rank in measured_ranks(folder))
    return any(span.kind in _COMPUTE for rank in measured for span in rank.spans)


def draw_profile(directory: str | Path, *, width: float = 12.0) -> tuple[Path, Path]:
    """Draw the step profiled in `directory` into it, as `timeline.png` and `timeline.svg`.

    Above, what the measured ranks did; below, over the same milliseconds, what the simulator makes of it when every action
    takes the median of its stage and no message takes any time. What is longer above was spent waiting, in communication,
    or in actions that took longer than others of their kind.

    Args:
        directory: one of `run.profiles`.
        width: of the picture, in inches. The height follows from the number of ranks.

    Returns:
        The paths of the PNG and the SVG.

    Raises:
        DataError: `directory` holds no profile, or that of a step without actions.
    """
    if measured_ranks(Path(directory)) and not has_actions(directory):
        raise DataError(
            f"{directory} holds nothing to draw: the step was compiled as one program, without actions"
        )

    from matplotlib import rc_context  # pyright: ignore[reportUnknownVariableType]
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    patch: Any = Patch

    step = ProfiledStep.load(directory)
    simulated = step.simulated
    shift = step.pipeline[0]
    planned = [
        [Span(action, start + shift, end + shift) for action, start, end in row] for row in simulated.spans
    ]
    ends = [end for rank in step.phases for _, end in rank]
    extent = (0.0, max([step.pipeline[1], shift + simulated.makespan, *ends]))

    upper, lower = len(step.executed), len(planned)
    row = row_height(upper + lower)
    caption = _caption(step)
    text = 0.1 + _LINE * len(caption)
    bottom = text + _LEGEND + 0.5
    height = _TOP + upper * row + _BETWEEN + lower * row + bottom
    inner = width - _LEFT - RIGHT
    unit = 72 * inner / extent[1]
    edge = _EDGE if unit * median(_lengths([*step.executed, *planned])) > 4 else 0.0
    png, svg = Path(directory, PICTURE), Path(directory, PICTURE).with_suffix(".svg")
    with rc_context({**STYLE, "hatch.linewidth": 0.6, "hatch.color": _WAIT_LOOK["edgecolor"]}):
        figure: Any = Figure(figsize=(width, height))

        def panel(above: float, rows: int) -> Any:
            """Axes that end `above` inches over the picture's bottom."""
            return figure.add_axes((_LEFT / width, above / height, inner / width, rows * row / height))

        top = panel(bottom + lower * row + _BETWEEN, upper)
        below = panel(bottom, lower)
        for number, spans in enumerate(step.executed):
            top.broken_barh([(shift, step.makespan)], (number + 0.04, 0.92), facecolor=IDLE)
            bars = [(start, end - start) for start, end in step.waits[number]]
            top.broken_barh(bars, (number + 0.04, 0.92), **_WAIT_LOOK)
            bars = [(start, end - start) for start, end in step.phases[number]]
            top.broken_barh(bars, (number + 0.04, 0.92), facecolor=_PHASE_COLOUR)
            paint_bars(top, number, spans, simulated.schedule, unit=unit, height=72 * row, edge=edge)
        for number, spans in enumerate(planned):
            below.broken_barh([(shift, simulated.makespan)], (number + 0.04, 0.92), facecolor=IDLE)
            paint_bars(below, number, spans, simulated.schedule, unit=unit, height=72 * row, edge=edge)
        frame(top, extent, [_label(step.plan, rank) for rank in step.ranks], row)
        frame(below, extent, [_stage_label(step.plan, rank) for rank in range(lower)], row)
        top.set_title(
            f"Executed: {step.makespan:,.1f} ms, bubble {100 * step.bubble_fraction:.1f} %", **TITLE
        )
        below.set_title(
            f"Simulated from its medians: {simulated.makespan:,.1f} ms, bubble {100 * simulated.bubble_fraction:.1f} %",
            **TITLE,
        )
        below.set_xlabel("milliseconds since the step began", color=INK)
        figure.text(_LEFT / width, 1 - 0.3 / height, _title(step), fontsize=12, fontweight="bold")
        figure.text(
            _LEFT / width, text / height, "\n".join(caption), verticalalignment="top", **_CAPTION_LOOK
        )
        others = (
            patch(label="waiting for a message", **_WAIT_LOOK),
            patch(facecolor=_PHASE_COLOUR, label="token count, gradient reduction, update"),
        )
        legend(figure, step.executed, simulated.schedule, (text + 0.05) / height, others)
        figure.savefig(png, dpi=160)
        figure.savefig(svg, metadata={"Date": None})
    return png, svg


def _lengths(rows: Iterable[Sequence[Span]]) -> list[float]:
    return [end - start for spans in rows for _, start, end in spans]


def _title(step: ProfiledStep) -> str:
    plan = step.plan
    degrees = " · ".join(f"{axis} {degree}" for axis, degree in plan.degrees._asdict().items() if degree > 1)
    passes = plan.training.accumulation
    microbatches = f"{plan.microbatches} microbatches{f' × accumulation {passes}' if passes > 1 else ''}"
    return f"Step {step.number}: {plan.schedule.name}, {degrees or '1 rank'}, {microbatches}"


def _stage_label(plan: Plan, pp: int) -> str:
    return f"rank {pp}" if plan.world_size == plan.degrees.pp else f"pp {pp}"


def _label(plan: Plan, rank: int) -> str:
    if plan.world_size == plan.degrees.pp:
        return f"rank {rank}"
    return f"rank {rank} (pp {plan.topology.coordinates(rank).pp})"


def _caption(step: ProfiledStep) -> list[str]:
    lines = [
        "Numbers are microbatches. Times are the pipeline's, from its first action to the end of its last; the bubble is the",
        "part in which ranks compute no action. Simulated: an action takes the median of its stage, a message no time.",
    ]
    world = step.plan.world_size
    if len(step.ranks) < world:
        ranks = ", ".join(map(str, step.ranks))
        lines.append(f"Only {len(step.ranks)} of {world} ranks were profiled: {ranks}.")
        if step.stages_not_measured:
            stages = ", ".join(map(str, step.stages_not_measured))
            lines.append(f"Not measured, and taken as the median of the others: stage {stages}.")
    return lines
