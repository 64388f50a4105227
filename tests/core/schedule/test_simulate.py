"""The simulator against the definition of when an action can start, and its speed."""

from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpsdk.errors import ScheduleError
from mpsdk.schedule import SENDS, Action, Costs, Schedule, generate, simulate, validate
from mpsdk.schedule.communication import receive_for, send_after
from tests.core.schedule.cases import evaluation_of, schedules


def ends_by_definition(schedule, costs):
    """The end of every compute action: sweeps over all actions until no time changes any more."""
    duration = {
        "F": costs.forward,
        "B": costs.backward,
        "I": costs.backward_input,
        "W": costs.backward_weight,
    }
    ends: dict[Action, float] = {}
    while True:
        before = dict(ends)
        arrivals: dict[Action, float] = {}
        for row in schedule.actions:
            free: dict[tuple[int, int], float] = {}
            for action in row:
                send = send_after(action, schedule.stage_rank)
                if action in ends and send is not None:
                    link = schedule.link(send)
                    free[link] = max(ends[action], free.get(link, 0)) + costs.communication[send.stage]
                    arrivals[send.other_end] = free[link]
        for row in schedule.actions:
            now = 0
            for action in row:
                if action.kind.value in duration:
                    receive = receive_for(action, schedule.stage_rank)
                    if receive is not None and receive not in arrivals:
                        break
                    start = max(now, arrivals[receive] if receive else 0)
                    now = ends[action] = start + duration[action.kind.value][action.stage]
        if ends == before:
            return ends


@settings(max_examples=60, deadline=None)
@given(schedules(degree=st.integers(1, 4)), st.data())
def test_times_are_the_earliest_that_dependencies_allow(schedule, data):
    numbers = st.lists(st.integers(0, 9), min_size=schedule.stages, max_size=schedule.stages)
    costs = Costs(*(data.draw(numbers) for _ in range(5)))
    timeline = simulate(schedule, costs)
    assert {span.action: span.end for row in timeline.spans for span in row} == ends_by_definition(
        schedule, costs
    )
    assert timeline.makespan == max(row[-1].end for row in timeline.spans)
    for row, busy, bubble in zip(timeline.spans, timeline.busy, timeline.bubble, strict=True):
        assert busy == sum(span.end - span.start for span in row)
        assert busy + bubble == timeline.makespan


@settings(max_examples=60, deadline=None)
@given(schedules(), st.booleans(), st.data())
def test_late_messages_make_every_action_later_and_hold_none_up_for_ever(schedule, trains, data):
    """Each stage's messages take a time of their own, up to a thousand forwards."""
    schedule = schedule if trains else evaluation_of(schedule)
    times = st.lists(st.integers(0, 1000), min_size=schedule.stages, max_size=schedule.stages)
    delays = data.draw(times)
    prompt, late = (simulate(schedule, Costs(communication=delay)) for delay in (0, delays))
    for before, after in zip(prompt.spans, late.spans, strict=True):
        assert [span.action for span in after] == [span.action for span in before]
        assert all(theirs.end <= ours.end for theirs, ours in zip(before, after, strict=True))
    sent = (action for row in schedule.actions for action in row if action.kind in SENDS)
    assert late.makespan <= prompt.makespan + sum(delays[action.stage] for action in sent)


@settings(max_examples=40, deadline=None)
@given(schedules(lookahead=st.just(0)), st.integers(1, 9))
def test_posting_receives_earlier_changes_no_time(schedule, communication):
    """A message's time starts with its send, so a receive that waits at its use waits as long as an earlier one."""
    costs = Costs(communication=communication)
    ahead = generate(
        schedule.name, schedule.degree, schedule.microbatches, schedule.virtual_stages, lookahead=3
    )
    assert simulate(ahead, costs).spans == simulate(schedule, costs).spans


def test_a_small_case_worked_out_by_hand():
    timeline = simulate(generate("1f1b", 2, 2), Costs(forward=1, backward=2, communication=0.5))
    rank0, rank1 = ([(str(span.action), span.start, span.end) for span in row] for row in timeline.spans)
    assert rank0 == [("F0.0", 0, 1), ("F0.1", 1, 2), ("B0.0", 5, 7), ("B0.1", 8, 10)]
    assert rank1 == [("F1.0", 1.5, 2.5), ("B1.0", 2.5, 4.5), ("F1.1", 4.5, 5.5), ("B1.1", 5.5, 7.5)]
    assert timeline.makespan == 10 and timeline.busy == (6, 6) and timeline.bubble == (4, 4)
    assert timeline.bubble_fraction == 0.4
    assert timeline.peak_in_flight == (2, 1)


def test_ranks_that_wait_for_each_other_are_named():
    rows = ("F0.0 RB0.0 B0.0 SF0.0", "RF1.0 F1.0 B1.0 SB1.0")
    actions = tuple(tuple(map(Action.parse, row.split())) for row in rows)
    with pytest.raises(ScheduleError, match=r"rank 0 at B0\.0, rank 1 at F1\.0"):
        simulate(Schedule("by hand", 2, 1, 1, actions, (0, 1)))


def test_costs_for_another_number_of_stages_are_refused():
    with pytest.raises(ScheduleError, match=r"Costs.backward = \(1, 2, 3\) must be one number or 2"):
        simulate(generate("1f1b", 2, 2), Costs(backward=(1, 2, 3)))
    with pytest.raises(ScheduleError, match="none below 0"):
        simulate(generate("1f1b", 2, 2), Costs(communication=-1))


def test_a_step_of_nothing_has_no_bubble():
    assert simulate(generate("1f1b", 2, 2), Costs(0, 0)).bubble_fraction == 0


@pytest.mark.parametrize(
    ("name", "degree", "virtual_stages", "makespan"),
    [
        ("gpipe", 64, 1, (1024 + 63) * 3),
        ("1f1b", 64, 1, (1024 + 63) * 3),
        ("interleaved", 16, 4, (4 * 1024 + 15) * 3),
        ("zb-h1", 64, 1, 1024 * 3 + 63),
        ("zb-v", 32, 2, 1024 * 6 + 31),
    ],
)
def test_64_stages_and_1024_microbatches_take_seconds(name, degree, virtual_stages, makespan):
    start = time.process_time()
    schedule = generate(name, degree, 1024, virtual_stages)
    validate(schedule)
    timeline = simulate(schedule, Costs(1, 2, 1, 1))
    assert time.process_time() - start < 15  # about 2 on an idle core
    assert schedule.stages == 64 and timeline.makespan == makespan
    parts = 3 if schedule.splits_backward else 2
    assert sum(map(len, timeline.spans)) == parts * 64 * 1024
