"""What the schedules are known for: complete, free of deadlock, their published bubbles and memory."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpsdk.errors import ScheduleError
from mpsdk.schedule import FORWARD_ONLY, GENERATORS, Costs, generate, simulate, stage_in_flight, validate
from tests.core.schedule.cases import evaluation_of, schedules

times = st.integers(1, 9)


@settings(max_examples=150, deadline=None)
@given(schedules())
def test_every_schedule_and_its_evaluation_are_valid(schedule):
    validate(schedule)
    validate(evaluation_of(schedule))


@settings(max_examples=60, deadline=None)
@given(schedules(("gpipe", "1f1b")), times, times)
def test_bubble_of_gpipe_and_1f1b(schedule, forward, backward):
    """(p-1)/(m+p-1) of the makespan, whatever a forward and a backward cost."""
    p, m = schedule.degree, schedule.microbatches
    timeline = simulate(schedule, Costs(forward, backward))
    assert timeline.makespan == (m + p - 1) * (forward + backward)
    assert timeline.bubble_fraction == pytest.approx((p - 1) / (m + p - 1))


@settings(max_examples=60, deadline=None)
@given(schedules(("interleaved",)), times, times)
def test_bubble_of_interleaved(schedule, forward, backward):
    """(p-1)/(v*m+p-1) of the makespan."""
    p, m, v = schedule.degree, schedule.microbatches, schedule.virtual_stages
    timeline = simulate(schedule, Costs(forward, backward))
    assert timeline.makespan == (v * m + p - 1) * (forward + backward)
    assert timeline.bubble_fraction == pytest.approx((p - 1) / (v * m + p - 1))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 7), st.integers(0, 12), times, times, times)
def test_idle_time_of_zb_h1(p, more, f, i, w):
    """(p-1)(F+I-W) on each rank where W is at most F and I; see the docstring for the rest."""
    timeline = simulate(generate("zb-h1", p, p + more), Costs(forward=f, backward_input=i, backward_weight=w))
    assert timeline.bubble == ((p - 1) * (f + i - min(f, i, w)),) * p
    if w <= min(f, i):
        assert timeline.bubble == ((p - 1) * (f + i - w),) * p


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 7), st.integers(0, 12), times)
def test_no_rank_is_idle_inside_zb_v(p, more, cost):
    timeline = simulate(generate("zb-v", p, 2 * p - 1 + more, 2), Costs(cost, 2 * cost, cost, cost))
    for row in timeline.spans:
        assert all(before.end == after.start for before, after in pairwise(row))
    assert timeline.bubble == ((p - 1) * cost,) * p  # waiting for the first microbatch, and for others to end


@settings(max_examples=80, deadline=None)
@given(schedules())
def test_most_in_flight(schedule):
    p, m, v = schedule.degree, schedule.microbatches, schedule.virtual_stages
    most = {
        "gpipe": lambda rank: m,
        "1f1b": lambda rank: min(m, p - rank),
        "interleaved": lambda rank: min(v * m, 2 * (p - 1 - rank) + (v - 1) * p + 1),
        "zb-h1": lambda rank: min(m, p),
    }
    peak = simulate(schedule).peak_in_flight
    if schedule.name == "zb-v":  # stages half the size: p whole microbatches, as the first rank of 1f1b
        assert peak == (2 * p,) * p if m >= 2 * p - 1 else max(peak) <= 2 * m
    else:
        assert peak == tuple(most[schedule.name](rank) for rank in range(p))
    assert all(
        max(by_stage) <= peak[rank] <= sum(by_stage)
        for rank in range(p)
        for by_stage in [[stage_in_flight(schedule)[stage] for stage in schedule.stages_of(rank)]]
    )


@settings(max_examples=40, deadline=None)
@given(schedules())
def test_evaluation_wastes_no_slot_and_keeps_nothing(schedule):
    p, m, v = schedule.degree, schedule.microbatches, schedule.virtual_stages
    timeline = simulate(evaluation_of(schedule))
    assert timeline.makespan == (2 * m + 2 * p - 2 if schedule.name == "zb-v" else v * m + p - 1)
    assert timeline.peak_in_flight == (1,) * p


def test_one_rank_needs_no_messages():
    for name, v in (("gpipe", 1), ("1f1b", 1), ("zb-h1", 1), ("zb-v", 2)):
        schedule = generate(name, 1, 3, v)
        assert all(action.kind in "FBIW" for action in schedule.actions[0])
        assert simulate(schedule).bubble == (0,)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("2f2b", 2, 4), "there is no schedule '2f2b'; there are 'gpipe', '1f1b'"),
        (("1f1b", 0, 4), "degree 0"),
        (("1f1b", 2, 0), "microbatches 0"),
        (("1f1b", 2, 4, 2), "1f1b needs exactly 1 virtual stages a rank, got 2"),
        (("zb-v", 2, 4), "zb-v needs exactly 2 virtual stages a rank, got 1"),
        (("interleaved", 2, 4), "interleaved needs at least 2 virtual stages a rank, got 1"),
        (("interleaved", 1, 4, 2), "degree of at least 2, got 1"),
        (("interleaved", 4, 6, 2), "6 is no multiple; 4 or 8 would do"),
        (("interleaved", 4, 3, 2), "3 is no multiple; 4 would do"),
        (("1f1b", 2, 4, 1, (1, 0)), "1f1b puts its stages on ranks"),
        ((FORWARD_ONLY, 2, 4, 2, (0, 0, 0, 1)), "must give each of 2 ranks 2 stages"),
        ((FORWARD_ONLY, 2, 4, 2, (0, 1)), "must give each of 2 ranks 2 stages"),
    ],
)
def test_sizes_that_have_no_schedule_are_refused(arguments, message):
    with pytest.raises(ScheduleError) as caught:
        generate(*arguments)
    assert message in str(caught.value)


def test_all_five_are_there():
    assert list(GENERATORS) == ["gpipe", "1f1b", "interleaved", "zb-h1", "zb-v"]
