"""Actions and schedules as data."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpsdk.errors import ScheduleError
from mpsdk.schedule import COMPUTE, RECEIVES, SENDS, Action, Kind, generate

actions = st.builds(Action, st.sampled_from(list(Kind)), st.integers(0, 9999), st.integers(0, 9999))


@given(actions)
def test_text_of_an_action_round_trips(action):
    assert Action.parse(str(action)) == action
    assert str(Action(Kind.SEND_FORWARD, 0, 3)) == "SF0.3"


@pytest.mark.parametrize("text", ["", "F", "F1", "X0.1", "F0.1 ", "F-1.0", "0F1"])
def test_other_text_is_no_action(text):
    with pytest.raises(ScheduleError, match="is no action"):
        Action.parse(text)


def test_kinds_are_compute_send_or_receive():
    assert sorted([*COMPUTE, *SENDS, *RECEIVES]) == sorted(Kind)


@given(actions.filter(lambda action: action.kind not in COMPUTE))
def test_a_message_has_two_ends(action):
    assert action.other_end.other_end == action
    assert action.other_end.stage == action.peer_stage
    assert (action.kind in SENDS) == (action.other_end.kind in RECEIVES)


def test_both_ends_of_a_message_are_on_one_link():
    schedule = generate("interleaved", 3, 3, 2)
    for rank, row in enumerate(schedule.actions):
        for action in row:
            if action.kind in SENDS:
                assert schedule.link(action) == schedule.link(action.other_end)
                assert schedule.link(action)[0] == rank
    assert schedule.link(Action(Kind.SEND_FORWARD, 2, 0)) == (2, 0)
    assert schedule.link(Action(Kind.RECEIVE_BACKWARD, 2, 0)) == (0, 2)


def test_a_schedule_prints_one_line_a_rank():
    assert str(generate("1f1b", 2, 2)).splitlines() == [
        "0: F0.0 SF0.0 F0.1 SF0.1 RB0.0 B0.0 RB0.1 B0.1",
        "1: RF1.0 F1.0 B1.0 SB1.0 RF1.1 F1.1 B1.1 SB1.1",
    ]


def test_stages_lie_in_a_loop_or_in_a_v():
    assert generate("1f1b", 3, 1).stage_rank == (0, 1, 2)
    assert generate("interleaved", 3, 3, 2).stage_rank == (0, 1, 2, 0, 1, 2)
    vee = generate("zb-v", 3, 1, 2)
    assert vee.stage_rank == (0, 1, 2, 2, 1, 0)
    assert [vee.stages_of(rank) for rank in range(3)] == [(0, 5), (1, 4), (2, 3)]


def test_hash_tells_schedules_apart_and_is_the_same_in_every_process():
    hashes = {
        generate(name, 2, m, v, lookahead=lookahead).hash
        for name, v in (("gpipe", 1), ("1f1b", 1), ("interleaved", 2), ("zb-h1", 1), ("zb-v", 2))
        for m in (2, 4)
        for lookahead in (0, 1)
    }
    assert len(hashes) == 20
    assert generate("gpipe", 1, 1).hash != generate("1f1b", 1, 1).hash  # the same actions under another name
    program = "from mpsdk.schedule import generate; print(generate('zb-v', 3, 7, 2).hash)"
    for seed in ("1", "2"):
        result = subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        )
        assert result.stdout.strip() == generate("zb-v", 3, 7, 2).hash


def test_hash_of_a_known_schedule_stays():
    """Plans and checkpoints keep it: when this changes, plans made before can no longer be run."""
    assert generate("1f1b", 2, 2).hash == "705835c1ad30c14828443bbb441f5582"
