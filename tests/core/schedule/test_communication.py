"""Where sends and receives go."""

from __future__ import annotations

import pytest
from hypothesis import given, settings

from mpsdk.errors import ScheduleError
from mpsdk.schedule import COMPUTE, RECEIVES, SENDS, Action, add_communication, generate
from mpsdk.schedule.communication import receive_for, send_after
from tests.core.schedule.cases import schedules


def parse(text: str) -> tuple[Action, ...]:
    return tuple(map(Action.parse, text.split()))


@settings(max_examples=60, deadline=None)
@given(schedules())
def test_sends_follow_their_action_and_receives_come_as_early_as_asked(schedule):
    for row in schedule.actions:
        computes = [action for action in row if action.kind in COMPUTE]
        position = {action: number for number, action in enumerate(computes)}
        before, done = None, 0
        posted = {}
        for action in row:
            if action.kind in SENDS:
                assert before in position and send_after(before, schedule.stage_rank) == action
            elif action.kind in RECEIVES:
                posted[action] = done
            else:
                done += 1
            before = action
        for action in computes:
            receive = receive_for(action, schedule.stage_rank)
            if receive is not None:
                assert posted.pop(receive) <= max(0, position[action] - schedule.lookahead)
        assert not posted


def test_stages_of_one_rank_exchange_no_messages():
    """At the tip of the V, stages 1 and 2 share a rank."""
    assert generate("zb-v", 2, 1, 2).actions[1] == parse(
        "RF1.0 F1.0 F2.0 SF2.0 RB2.0 I2.0 W2.0 I1.0 SB1.0 W1.0"
    )


def test_receives_keep_the_order_of_the_sends_where_a_link_carries_both_directions():
    """Rank 0 of a V sends activations of its first stage and gradients of its last one; rank 1 uses them otherwise."""
    schedule = generate("zb-v", 2, 4, 2)
    sent = [action.other_end for action in schedule.actions[0] if action.kind in SENDS]
    used = [
        receive_for(action, schedule.stage_rank) for action in schedule.actions[1] if action.kind in COMPUTE
    ]
    assert [action for action in schedule.actions[1] if action.kind in RECEIVES] == sent
    assert [action for action in used if action] != sent


def test_lookahead_posts_a_receive_earlier():
    late, early = (generate("1f1b", 2, 3, lookahead=ahead).actions[1] for ahead in (0, 1))
    assert late == parse("RF1.0 F1.0 B1.0 SB1.0 RF1.1 F1.1 B1.1 SB1.1 RF1.2 F1.2 B1.2 SB1.2")
    assert early == parse("RF1.0 F1.0 RF1.1 B1.0 SB1.0 F1.1 RF1.2 B1.1 SB1.1 F1.2 B1.2 SB1.2")


def test_a_message_that_nobody_sends_is_refused_by_rank_and_action():
    orders = (parse("F0.0"), parse("F1.0 F1.1"))
    with pytest.raises(ScheduleError, match=r"rank 1: F1\.1 needs RF1\.1, but no rank does SF0\.1"):
        add_communication(orders, (0, 1))
