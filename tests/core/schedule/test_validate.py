"""The validator refuses what is wrong, names it, and accepts nothing that then fails."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from mpsdk.errors import ScheduleError
from mpsdk.schedule import FORWARD_ONLY, Action, Kind, Schedule, add_communication, generate, validate
from tests.core.schedule.cases import Toy, schedules


def written(*rows: str, name: str = "by hand", microbatches: int = 1, **changes) -> Schedule:
    actions = tuple(tuple(map(Action.parse, row.split())) for row in rows)
    ranks = tuple(range(len(rows)))
    return replace(Schedule(name, len(rows), microbatches, 1, actions, ranks), **changes)


WHOLE = ("F0.0 SF0.0 RB0.0 B0.0", "RF1.0 F1.0 B1.0 SB1.0")


def test_a_schedule_written_by_hand_is_valid():
    validate(written(*WHOLE))
    validate(written("F0.0 SF0.0 RB0.0 I0.0 W0.0", "RF1.0 F1.0 I1.0 SB1.0 W1.0"))
    validate(written("F0.0 SF0.0", "RF1.0 F1.0", name=FORWARD_ONLY))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (("F0.0 SF0.0 RB0.0", WHOLE[1]), "rank 0: nowhere does I0.0, W0.0 (B is I and W in one)"),
        (("F0.0 SF0.0 RB0.0 I0.0", WHOLE[1]), "rank 0: nowhere does W0.0"),
        (("F0.0 SF0.0 RB0.0 B0.0 W0.0", WHOLE[1]), "rank 0: W0.0 comes a second time"),
        (("F0.0 SF0.0 F0.0 RB0.0 B0.0", WHOLE[1]), "rank 0: F0.0 comes a second time"),
        (("F0.0 SF0.0 B0.0 RB0.0", WHOLE[1]), "rank 0: B0.0 comes before RB0.0, which it needs"),
        (("SF0.0 F0.0 RB0.0 B0.0", WHOLE[1]), "rank 0: SF0.0 comes before F0.0, which it needs"),
        (("F0.0 SF0.0 RB0.0 W0.0 I0.0", WHOLE[1]), "rank 0: W0.0 comes before I0.0, which it needs"),
        ((WHOLE[0], "F1.0 RF1.0 B1.0 SB1.0"), "rank 1: F1.0 comes before RF1.0, which it needs"),
        ((WHOLE[0], "RF1.0 F1.0 B1.0"), "rank 1: nowhere does SB1.0"),
        ((WHOLE[0], "RF1.0 F1.0 B1.0 SB1.0 SF1.0"), "rank 1: SF1.0 has no place in by hand"),
        ((WHOLE[0], "RF1.0 F1.0 B1.0 SB1.0 F0.0"), "rank 1: F0.0 is for rank 0"),
        ((WHOLE[0], "RF1.0 F1.0 B1.0 SB1.0 F1.1"), "rank 1: F1.1 is outside the 2 stages and 1 microbatches"),
        (
            ("F0.0 RB0.0 B0.0 SF0.0", WHOLE[1]),
            "rank 0 waits at RB0.0 for rank 1; rank 1 waits at RF1.0 for rank 0",
        ),
        ((WHOLE[0],), "rank 0: SF0.0 has no place in by hand: no other rank"),
    ],
)
def test_a_broken_schedule_is_refused_by_rank_and_action(rows, message):
    with pytest.raises(ScheduleError) as caught:
        validate(written(*rows))
    assert message in str(caught.value)


def test_evaluation_has_no_backward():
    with pytest.raises(ScheduleError, match=r"rank 0: RB0\.0 has no place in forward-only"):
        validate(written(*WHOLE, name=FORWARD_ONLY))


def test_the_number_of_stages_must_fit():
    with pytest.raises(ScheduleError, match="actions of 2 ranks and 3 stages"):
        validate(written(*WHOLE, stage_rank=(0, 1, 0)))


def test_receives_out_of_order_are_refused():
    first, second = generate("gpipe", 2, 2).actions
    swapped = list(second)
    swapped[:4] = [second[2], second[3], second[0], second[1]]
    with pytest.raises(ScheduleError, match=r"rank 1: RF1\.1 comes where rank 0 does SF0\.0"):
        validate(replace(generate("gpipe", 2, 2), actions=(first, tuple(swapped))))


def test_a_schedule_that_needs_more_than_one_message_in_a_channel_is_refused():
    """Breadth first over two virtual stages: both ranks go on sending before either takes what it was sent."""
    stage_rank = (0, 1, 0, 1)
    orders = tuple(
        tuple(Action(Kind.FORWARD, stage, number) for stage in (rank, rank + 2) for number in range(4))
        for rank in range(2)
    )
    actions = add_communication(orders, stage_rank)
    schedule = Schedule(FORWARD_ONLY, 2, 4, 2, actions, stage_rank)
    with pytest.raises(ScheduleError, match="deadlock with rendezvous sends: rank 0 waits at SF0"):
        validate(schedule)
    Toy(schedule, Random(0)).run()
    with pytest.raises(AssertionError, match="wait for each other"):
        Toy(schedule, Random(0), room=1).run()


def test_receives_ahead_of_their_use_deadlock_only_if_they_wait():
    """With lookahead 1, each of ranks 1 and 2 asks for what the other sends later; posted receives don't mind."""
    schedule = generate("1f1b", 3, 4, lookahead=1)
    validate(schedule)
    with pytest.raises(ScheduleError, match=r"deadlock with buffered sends: .*rank 1 waits at RB1"):
        validate(replace(schedule, lookahead=0))


@settings(max_examples=200, deadline=None)
@given(schedules(degree=st.integers(2, 4)), st.integers(0, 2**32))
def test_what_is_accepted_runs(schedule, seed):
    """With neighbours swapped here and there, either the validator says what is wrong, or late ranks manage all the same."""
    random = Random(seed)
    rows = [list(row) for row in schedule.actions]
    for _ in range(random.randint(1, 4)):
        row = random.choice(rows)
        at = random.randrange(len(row) - 1)
        row[at : at + 2] = row[at + 1], row[at]
    swapped = replace(schedule, actions=tuple(map(tuple, rows)))
    try:
        validate(swapped)
    except ScheduleError:
        event("refused")
        return
    event("accepted")
    toy = Toy(swapped, random, room=random.choice([None, 1]))
    toy.run()
    toy.check()


@settings(max_examples=100, deadline=None)
@given(schedules(), st.integers(0, 2**32))
def test_a_missing_action_is_always_found(schedule, seed):
    random = Random(seed)
    rows = [list(row) for row in schedule.actions]
    row = random.choice(rows)
    row.pop(random.randrange(len(row)))
    with pytest.raises(ScheduleError, match="rank"):
        validate(replace(schedule, actions=tuple(map(tuple, rows))))
