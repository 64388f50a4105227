"""Several layouts of a job side by side: what each holds, sends and takes, or why it is refused."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mpsdk.config import Distribution
from mpsdk.errors import ConfigError, Problem
from mpsdk.estimate import DeviceFigures, Estimate, StepTime
from mpsdk.report.display import quantity
from mpsdk.report.plan_table import columns, facts_table, page, seconds_text

if TYPE_CHECKING:
    from mpsdk.estimator import Estimator

OWN = "job"
AXES = ("tp", "pp", "sdp", "dp")


@dataclass(frozen=True)
class Layout:
    """One row: its estimate, and its time where the device's figures are known; or the problems that refuse it."""

    name: str
    estimate: Estimate | None
    time: StepTime | None
    problems: tuple[Problem, ...] = ()

    @property
    def fits(self) -> bool | None:
        """Whether it fits the device; None for a layout that is refused, or a device of unknown memory."""
        if self.estimate is None or self.estimate.figures is None:
            return None
        return bool(self.estimate.fits())

    def sent(self, axis: str) -> int:
        """Bytes that a rank sends in a step along `axis` alone, of the rank that sends most."""
        if self.estimate is None:
            return 0
        return max(
            sum(message.wire for message in rank.of_step() if message.axes == (axis,))
            for rank in self.estimate.messages
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        if self.estimate is None:
            return {"name": self.name, "problems": [str(problem) for problem in self.problems]}
        plan = self.estimate.plan
        return {
            "name": self.name,
            "plan": plan.hash,
            "degrees": plan.degrees._asdict(),
            "microbatches": plan.microbatches,
            "peak": self.estimate.fullest.peak,
            "fits": self.fits,
            "bubble": self.estimate.timeline.bubble_fraction,
            "sent": {axis: self.sent(axis) for axis in AXES},
            "step_time": self.time.to_dict() if self.time else None,
        }


@dataclass(frozen=True)
class Comparison:
    """The layouts in the order in which they were given. `print` shows a table, then why others are refused."""

    layouts: tuple[Layout, ...]

    def to_dict(self) -> list[dict[str, Any]]:
        """Plain data, ready for JSON: one entry a layout."""
        return [layout.to_dict() for layout in self.layouts]

    def __str__(self) -> str:
        planned = [layout for layout in self.layouts if layout.estimate is not None]
        timed = any(layout.time for layout in planned)
        axes = [axis for axis in AXES if any(layout.sent(axis) for layout in planned)]
        titles = ["layout", "ranks", "peak", *(["fits"] if timed else []), "bubble"]
        titles += [f"{axis} sent" for axis in axes] + (["step", "tokens/s"] if timed else [])
        parts = [columns(titles, (tuple(_row(layout, axes)) for layout in planned), left=(0, 1), padding=2)]
        figures = next((layout.estimate.figures for layout in planned if layout.estimate), None)
        if figures is not None:
            parts.append(facts_table([("device", _device(figures, planned))]))
        refused = [layout for layout in self.layouts if layout.estimate is None]
        if refused:
            parts.append(facts_table(_refusals(refused)))
        return page(*(parts if planned else parts[1:]))


def compare(
    job: Estimator,
    others: Mapping[str, Estimator | Distribution | Mapping[str, object] | str | os.PathLike[str]],
    *,
    world_size: int | None = None,
    device: str | os.PathLike[str] | DeviceFigures | None = None,
    name: str = OWN,
) -> Comparison:
    """Plan a job in its own layout and in others, and put them side by side. Starts nothing, imports no framework.

    Args:
        job: the job, whose own layout comes first, under `name`.
        others: by name, another job; or a distribution in place of the job's own: a `Distribution`, a dict, or a file.
        world_size: ranks to plan for; None: as many as each job would start.
        device: what they run on; see `Plan.estimate`. None: the kind of device here, without its memory or speed.

    Raises:
        ConfigError: the device is not known, or lacks a figure. A layout that is refused is a row that says why.
    """
    from mpsdk.estimator import Estimator

    layouts = [_layout(name, job, world_size, device)]
    for other, given in others.items():
        try:
            estimator = given if isinstance(given, Estimator) else job.with_distribution(given)
        except ConfigError as error:
            layouts.append(Layout(other, None, None, error.problems))
        else:
            layouts.append(_layout(other, estimator, world_size, device))
    return Comparison(tuple(layouts))


def _layout(
    name: str,
    estimator: Estimator,
    world_size: int | None,
    device: str | os.PathLike[str] | DeviceFigures | None,
) -> Layout:
    try:
        plan = estimator.plan(world_size)
    except ConfigError as error:
        return Layout(name, None, None, error.problems)
    estimate = plan.estimate(device or estimator.device(world_size))
    return Layout(name, estimate, estimate.step_time() if estimate.figures else None)


def _row(layout: Layout, axes: list[str]) -> Iterator[str]:
    estimate = layout.estimate
    assert estimate is not None
    plan = estimate.plan
    yield layout.name
    yield " ".join(f"{axis}{n}" for axis, n in plan.degrees._asdict().items() if n > 1) or "one"
    yield f"{quantity(estimate.fullest.peak)}B"
    if layout.fits is not None:
        yield "yes" if layout.fits else "no"
    yield f"{estimate.timeline.bubble_fraction:.1%}" if plan.degrees.pp > 1 else "-"
    for axis in axes:
        sent = layout.sent(axis)
        yield f"{quantity(sent)}B" if sent else "-"
    if layout.time is not None:
        yield seconds_text(layout.time.seconds)
        yield quantity(layout.time.tokens_per_second)


def _device(figures: DeviceFigures, layouts: list[Layout]) -> str:
    worlds = {layout.estimate.plan.world_size for layout in layouts if layout.estimate}
    room = "; ".join(
        f"{quantity(figures.usable_memory(world))}B for each of {world:,} ranks" for world in sorted(worlds)
    )
    return f"{figures.name}, {room}"


def _refusals(layouts: list[Layout]) -> Iterator[tuple[str, str]]:
    for layout in layouts:
        name = layout.name
        for problem in layout.problems:
            yield name, f"refused: {problem}"
            name = ""
