"""The order of compute actions against torch.distributed.pipelining's own schedule classes, action by action.

Stages are stand-ins: the multi-stage classes make their order when they are constructed, and the two single-stage
classes are run without any communication while the stand-in writes down what they ask of it.
"""

from __future__ import annotations

from collections.abc import Callable
from unittest.mock import MagicMock

import pytest
from torch.distributed.pipelining.schedules import (
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleZBVZeroBubble,
)

from mpsdk.schedule import COMPUTE, Action, Schedule, generate

Row = list[tuple[str, int, int]]


def computes(actions: tuple[Action, ...]) -> Row:
    return [
        (action.kind.value, action.stage, action.microbatch) for action in actions if action.kind in COMPUTE
    ]


def stage(degree: int, stages: int, rank: int = 0, index: int = 0) -> MagicMock:
    stand_in = MagicMock(
        stage_index=index, num_stages=stages, group_size=degree, group_rank=rank, submod=None
    )
    stand_in.is_first, stand_in.is_last = index == 0, index == stages - 1
    for operations in ("get_fwd_recv_ops", "get_fwd_send_ops", "get_bwd_recv_ops", "get_bwd_send_ops"):
        getattr(stand_in, operations).return_value = []
    return stand_in


def order_as_run(kind: type, degree: int, microbatches: int, rank: int) -> Row:
    stand_in, row = stage(degree, degree, rank, rank), []

    def note(letter: str) -> Callable[..., None]:
        return lambda microbatch, *args, **kwargs: row.append((letter, rank, microbatch))

    stand_in.forward_one_chunk.side_effect = note("F")
    stand_in.backward_one_chunk.side_effect = note("B")
    schedule = kind(stand_in, microbatches)
    schedule._initialize_stage = lambda *args: None
    schedule._step_microbatches([()] * microbatches, [{}] * microbatches)
    return row


def order_as_planned(kind: type, ours: Schedule) -> list[Row]:
    stages = [stage(ours.degree, ours.stages, 0, index) for index in range(ours.virtual_stages)]
    theirs = kind(stages, ours.microbatches).pipeline_order
    return [
        [
            (action.computation_type.value, action.stage_index, action.microbatch_index)
            for action in theirs[rank]
            if action is not None
        ]
        for rank in range(ours.degree)
    ]


@pytest.mark.parametrize(("name", "kind"), [("gpipe", ScheduleGPipe), ("1f1b", Schedule1F1B)])
@pytest.mark.parametrize("degree", [1, 2, 4, 7])
@pytest.mark.parametrize("rounds", [1, 2, 3])
def test_single_stage_schedules_run_in_torchs_order(name, kind, degree, rounds):
    ours = generate(name, degree, degree * rounds + rounds - 1)
    for rank in range(degree):
        assert computes(ours.actions[rank]) == order_as_run(kind, degree, ours.microbatches, rank)


@pytest.mark.parametrize("degree", [2, 3, 4, 8])
@pytest.mark.parametrize("virtual_stages", [2, 3, 4])
@pytest.mark.parametrize("rounds", [1, 2, 5])
def test_interleaved_is_in_torchs_order(degree, virtual_stages, rounds):
    ours = generate("interleaved", degree, degree * rounds, virtual_stages)
    assert [computes(row) for row in ours.actions] == order_as_planned(ScheduleInterleaved1F1B, ours)


@pytest.mark.parametrize("degree", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("microbatches", [1, 4, 7, 16, 23])
def test_zb_v_is_in_torchs_order(degree, microbatches):
    ours = generate("zb-v", degree, microbatches, 2)
    assert [computes(row) for row in ours.actions] == order_as_planned(ScheduleZBVZeroBubble, ours)


@pytest.mark.parametrize("degree", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("rounds", [1, 2, 5])
def test_zb_h1_is_in_torchs_order(degree, rounds):
    """torch has it as the interleaved zero-bubble schedule, with one stage a rank."""
    ours = generate("zb-h1", degree, degree * rounds)
    assert [computes(row) for row in ours.actions] == order_as_planned(ScheduleInterleavedZeroBubble, ours)
