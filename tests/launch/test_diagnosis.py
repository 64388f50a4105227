from __future__ import annotations

import signal
from pathlib import Path

import pytest

from mpsdk.launch import PeerError
from mpsdk.launch.diagnosis import (
    Failure,
    Observation,
    failure_text,
    is_consequence,
    likely_hung,
    read_failure,
    root_cause,
    write_failure,
)
from mpsdk.launch.heartbeat import Activity


def failure(rank: int, time: float, *, consequence: bool = False, message: str = "it broke") -> Failure:
    return Failure(rank, "g1", time, "ValueError", message, "Traceback ...", "step 3: forward 2", consequence)


def seen(rank: int, **known: object) -> Observation:
    fields: dict = {
        "rank": rank,
        "exit_code": None,
        "ended_at": None,
        "failure": None,
        "activity": Activity(9, 0.0, "step 3: forward 2"),
        "silent": 0.5,
        "log": Path(f"runs/logs/rank-{rank}.log"),
    }
    return Observation(**{**fields, **known})


def test_first_own_error_is_the_cause():
    ranks = [seen(0, failure=failure(0, 11.0)), seen(1, failure=failure(1, 10.0)), seen(2)]
    assert root_cause(ranks) is ranks[1]


def test_a_signal_is_preferred_over_an_earlier_connection_error():
    lost = seen(0, exit_code=1, failure=failure(0, 10.0, consequence=True))
    killed = seen(1, exit_code=-signal.SIGKILL, ended_at=10.5)
    assert root_cause([lost, killed]) is killed


def test_an_own_error_is_preferred_over_an_earlier_abort_by_a_communication_library():
    aborted = seen(0, exit_code=-signal.SIGABRT, ended_at=10.0)
    raised = seen(1, exit_code=1, failure=failure(1, 10.5))
    assert root_cause([aborted, raised]) is raised


def test_an_exit_without_a_word_is_preferred_over_a_connection_error():
    lost = seen(0, exit_code=1, failure=failure(0, 10.0, consequence=True))
    silent = seen(1, exit_code=3, ended_at=10.5)
    assert root_cause([lost, silent]) is silent


def test_without_failures_there_is_no_cause():
    assert root_cause([seen(0), seen(1, exit_code=0)]) is None


def test_the_rank_that_hangs_is_the_one_that_does_not_wait():
    waiting = seen(0, silent=9.0, activity=Activity(4, 0.0, "step 3: receive activation 2 from stage 1"))
    working = seen(1, silent=8.0)
    assert likely_hung([waiting, working], overdue=[0]) is working
    assert likely_hung([waiting, seen(1, silent=8.0, activity=waiting.activity)], overdue=[0, 1]) is waiting


def test_a_rank_waits_when_its_stack_ends_in_a_collective():
    frame = '  File "/site-packages/torch/distributed/distributed_c10d.py", line 3257 in all_reduce\n  File "model.py"'
    waiting = seen(0, silent=9.0, stack=frame)
    working = seen(
        1, silent=8.0, stack='  File "model.py", line 3 in forward\n  File "torch/distributed/run.py"'
    )
    assert likely_hung([waiting, working], overdue=[0]) is working


@pytest.mark.parametrize(
    "error",
    [
        ConnectionResetError(104, "Connection reset by peer"),
        PeerError("rank 0 waited"),
        RuntimeError("[../gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:41231"),
        RuntimeError(
            "[../gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 5000ms for recv operation to complete"
        ),
        RuntimeError("Gloo connectFullMesh failed with [../gloo/transport/tcp/pair.cc:144] no error"),
        type("UnavailableError", (Exception,), {})("Socket closed"),
        type("DistNetworkError", (RuntimeError,), {})("failed to recv, got 0 bytes"),
    ],
)
def test_errors_of_a_rank_that_lost_a_peer_are_consequences(error):
    assert is_consequence(error)


@pytest.mark.parametrize(
    "error",
    [
        ValueError("loss is not finite"),
        FileNotFoundError("corpus.txt"),
        RuntimeError("CUDA out of memory"),
        MemoryError(),
    ],
)
def test_a_ranks_own_errors_are_not(error):
    assert not is_consequence(error)


def test_an_error_that_rank_0_passed_on_is_a_consequence():
    error = ValueError("no")
    error.__cause__ = PeerError("rank 0 failed in 'data'")
    assert is_consequence(error)


def test_errors_of_an_earlier_start_are_not_read(tmp_path):
    write_failure(tmp_path, failure(1, 10.0))
    assert read_failure(tmp_path, 1, "g1") == failure(1, 10.0)
    assert read_failure(tmp_path, 1, "g2") is None
    assert read_failure(tmp_path, 0, "g1") is None


def test_report_begins_with_the_rank_the_error_and_its_traceback():
    culprit = seen(1, exit_code=1, failure=failure(1, 10.0, message="loss is not finite"))
    lines = failure_text(culprit, [seen(0), culprit]).splitlines()
    assert lines[0] == "rank 1 of 2 failed with ValueError: loss is not finite"
    assert lines[1] == "while: step 3: forward 2"
    assert lines[3] == "Traceback ..."
    assert "  rank 0  running, silent for 0.5 s  step 3: forward 2" in lines


def test_report_of_a_silent_exit_quotes_the_log_from_the_last_traceback():
    log = "hello\nTraceback (most recent call last):\n old\nnoise\nTraceback (most recent call last):\n  new\nImportError: x\n"
    culprit = seen(0, exit_code=1, ended_at=1.0, activity=None, log_tail=log)
    text = failure_text(culprit, [culprit])
    assert "ended with exit code 1, while: not in Python yet" in text
    assert "ImportError: x" in text and "old" not in text
