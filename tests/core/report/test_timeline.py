"""The picture of a profiled step: what ran beside what was simulated, made by hand and on the numpy backend."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from mpsdk import Estimator
from mpsdk.errors import DataError
from mpsdk.plan import Plan
from mpsdk.profile import MeasuredSpan, RankSpans
from mpsdk.report.timeline import ProfiledStep, draw_profile
from mpsdk.schedule import COMPUTE, Costs, Kind, simulate
from tests.core.jobs import MODEL, TRAINING


def measured_in(
    folder: Path,
    plan: Plan,
    costs: Costs,
    *,
    ranks: tuple[int, ...] | None = None,
    machine_of: tuple[str, ...] = ("one",) * 64,
    zero_of: dict[str, float] | None = None,
) -> Path:
    """A profile in which every rank ran exactly as the simulator has it, pass after pass, in seconds."""
    timeline = simulate(plan.schedule, costs)
    folder.mkdir(parents=True)
    plan.save(folder / "plan.json")
    for rank in ranks or range(plan.world_size):
        zero = (zero_of or {"one": 1000.0})[machine_of[rank]]
        row = timeline.spans[plan.topology.coordinates(rank).pp]
        spans = tuple(
            MeasuredSpan(
                kind=action.kind.value,
                stage=action.stage,
                microbatch=action.microbatch,
                part=part,
                start=zero + part * timeline.makespan + start,
                end=zero + part * timeline.makespan + end,
            )
            for part in range(plan.training.accumulation)
            for action, start, end in row
        )
        RankSpans(rank=rank, machine=machine_of[rank], met=zero, spans=spans).save(folder)
    return folder


def plan_of(world_size: int, accumulation: int = 1, **distribution: Any) -> Plan:
    training = {**TRAINING, "global_batch": 8 * accumulation, "accumulation": accumulation}
    return Estimator({**MODEL, "n_layer": 4}, distribution=distribution, training=training).plan(world_size)


LAYOUTS = {
    "1f1b": (2, {"pipeline": {"degree": 2, "microbatches": 4}}),
    "zb-v": (2, {"pipeline": {"degree": 2, "microbatches": 4, "schedule": "zb-v", "virtual_stages": 2}}),
    "tensor parallel": (4, {"pipeline": {"degree": 2, "microbatches": 4}, "tensor_parallel": 2}),
    "no pipeline": (1, {}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_step_that_ran_as_simulated_is_simulated_as_it_ran(layout: str, tmp_path: Path) -> None:
    world_size, distribution = LAYOUTS[layout]
    plan = plan_of(world_size, **distribution)
    costs = Costs(forward=0.25, backward=0.5, backward_input=0.25, backward_weight=0.125)
    step = ProfiledStep.load(measured_in(tmp_path / "step-00000003", plan, costs))
    expected = simulate(plan.schedule, costs)
    assert step.makespan == pytest.approx(1000 * expected.makespan)
    assert step.simulated.makespan == pytest.approx(step.makespan)
    assert step.bubble_fraction == pytest.approx(expected.bubble_fraction)
    assert step.simulated.bubble_fraction == pytest.approx(step.bubble_fraction)
    assert step.stages_not_measured == []


def test_the_simulator_gets_the_median_of_each_stage(tmp_path: Path) -> None:
    plan = plan_of(2, pipeline={"degree": 2, "microbatches": 4})
    folder = measured_in(tmp_path / "step-00000001", plan, Costs(forward=[1, 2], backward=[3, 5]))
    spans = RankSpans.load(folder / "rank-00001.spans.json")
    slow = [
        span.model_copy(update={"end": span.end + 100}) if (span.kind, span.microbatch) == ("F", 0) else span
        for span in spans.spans
    ]
    spans.model_copy(update={"spans": tuple(slow)}).save(folder)
    durations = ProfiledStep.load(folder).durations
    assert durations[Kind.FORWARD] == pytest.approx([1000, 2000])
    assert durations[Kind.BACKWARD] == pytest.approx([3000, 5000])


def test_passes_of_accumulation_follow_one_another(tmp_path: Path) -> None:
    plan = plan_of(2, accumulation=3, pipeline={"degree": 2, "microbatches": 2})
    step = ProfiledStep.load(measured_in(tmp_path / "step-00000001", plan, Costs()))
    forwards = [span.action.microbatch for span in step.executed[0] if span.action.kind is Kind.FORWARD]
    assert forwards == list(range(6))
    planned = [span.action for span in step.simulated.spans[0]]
    assert planned == [span.action for span in step.executed[0]]
    # In 1f1b rank 0 begins a pass and ends it, so that the passes don't overlap.
    assert step.simulated.makespan == pytest.approx(3000 * simulate(plan.schedule).makespan)


def test_clocks_of_two_machines_are_brought_together(tmp_path: Path) -> None:
    plan = plan_of(2, pipeline={"degree": 2, "microbatches": 4})
    one = ProfiledStep.load(measured_in(tmp_path / "one" / "step-00000001", plan, Costs()))
    apart = measured_in(
        tmp_path / "two" / "step-00000001",
        plan,
        Costs(),
        machine_of=("left", "right"),
        zero_of={"left": 5.0, "right": 90_000.0},
    )
    two = ProfiledStep.load(apart)
    for there, here in zip(two.executed, one.executed, strict=True):
        assert [span.start for span in there] == pytest.approx([span.start for span in here])


def test_where_only_some_ranks_were_measured_the_picture_says_so(tmp_path: Path) -> None:
    plan = plan_of(4, pipeline={"degree": 2, "microbatches": 4}, tensor_parallel=2)
    folder = measured_in(tmp_path / "step-00000003", plan, Costs(), ranks=(1,))
    step = ProfiledStep.load(folder)
    assert step.durations[Kind.FORWARD] == [pytest.approx(1000), None]
    assert step.simulated.makespan == pytest.approx(1000 * simulate(plan.schedule).makespan)
    _, svg = draw_profile(folder)
    words = "\n".join(texts(svg))
    assert "Only 1 of 4 ranks were profiled: 1." in words
    assert "Not measured, and taken as the median of the others: stage 1." in words
    assert "rank 1 (pp 0)" in words and "rank 0" not in words


def texts(path: Path) -> list[str]:
    return [
        element.text or "" for element in ElementTree.parse(path).iter("{http://www.w3.org/2000/svg}text")
    ]


def test_the_picture_has_both_timelines_and_what_they_come_to(tmp_path: Path) -> None:
    plan = plan_of(2, pipeline={"degree": 2, "microbatches": 4})
    folder = measured_in(tmp_path / "step-00000012", plan, Costs(forward=0.01, backward=0.02))
    png, svg = draw_profile(folder)
    words = texts(svg)
    assert png.read_bytes().startswith(b"\x89PNG")
    assert "Step 12: 1f1b, pp 2, 4 microbatches" in words
    assert "Executed: 150.0 ms, bubble 20.0 %" in words
    assert "Simulated from its medians: 150.0 ms, bubble 20.0 %" in words
    assert words.count("rank 1") == 2
    numbers = [word for word in words if word in {"0", "1", "2", "3"}]
    bars = sum(action.kind in COMPUTE for row in plan.schedule.actions for action in row)
    ticks_at_zero = 2
    assert len(numbers) == 2 * bars + ticks_at_zero


def test_waiting_is_drawn_apart_from_computing(tmp_path: Path) -> None:
    plan = plan_of(2, pipeline={"degree": 2, "microbatches": 4})
    folder = measured_in(tmp_path / "step-00000001", plan, Costs())
    busy = ProfiledStep.load(folder).bubble_fraction
    spans = RankSpans.load(folder / "rank-00001.spans.json")
    wait = MeasuredSpan(kind="wait", stage=1, microbatch=0, start=spans.met, end=spans.spans[0].start)
    spans.model_copy(update={"spans": (wait, *spans.spans)}).save(folder)
    step = ProfiledStep.load(folder)
    assert step.waits == [[], [pytest.approx((0.0, 1000.0))]]
    assert step.bubble_fraction == busy


def test_a_folder_without_a_profile_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no profile"):
        draw_profile(tmp_path)
    (tmp_path / "rank-00000.spans.json").write_text('{"format": 2}')
    with pytest.raises(DataError, match="holds no spans of this version"):
        RankSpans.load(tmp_path / "rank-00000.spans.json")
