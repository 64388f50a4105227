from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from mpsdk.errors import CheckpointError, ConfigError, Problem, WorkerError
from mpsdk.launch import Control, LocalLauncher, PeerError
from mpsdk.launch.control import control_directory, request_stop
from mpsdk.launch.heartbeat import Heartbeat, activity_path
from tests.launch.scripts import worker_command


def on_all_ranks(
    directory: Path, world_size: int, work: Callable[[Control, int], Any], timeout: float = 10.0
) -> list[Future[Any]]:
    """What `work` gives or raises on each rank, the ranks being threads."""
    with ThreadPoolExecutor(world_size) as pool:
        controls = [Control(directory, "g1", rank, world_size, timeout) for rank in range(world_size)]
        return [pool.submit(work, control, rank) for rank, control in enumerate(controls)]


def test_collect_gives_every_rank_all_values_in_rank_order(tmp_path):
    def work(control: Control, rank: int) -> list[Any]:
        time.sleep(0.03 * (3 - rank))
        control.publish("part", {"rank": rank, "parts": [rank] * rank})
        return control.collect("part")

    expected = [{"rank": rank, "parts": [rank] * rank} for rank in range(3)]
    assert [future.result() for future in on_all_ranks(tmp_path, 3, work)] == [expected] * 3


def test_decide_calls_only_rank_0_and_gives_its_value_to_all(tmp_path):
    calls: list[int] = []

    def work(control: Control, rank: int) -> object:
        return control.decide("resume", lambda: calls.append(rank) or {"step": 100, "path": None})

    results = [future.result() for future in on_all_ranks(tmp_path, 4, work)]
    assert results == [{"step": 100, "path": None}] * 4 and calls == [0]


@pytest.mark.parametrize(
    "error",
    [
        CheckpointError("step-00000100 is damaged: 2 chunks"),
        ConfigError([Problem("pipeline.degree", 3, "must divide 8: use 1, 2, 4 or 8")], where="the plan"),
        ValueError("no"),
        FileNotFoundError("corpus.txt"),
    ],
)
def test_what_rank_0_raises_is_raised_on_all_ranks(tmp_path, error):
    def work(control: Control, rank: int) -> None:
        def make() -> None:
            raise error

        control.decide("data", make)

    raised = [future.exception() for future in on_all_ranks(tmp_path, 3, work)]
    assert raised[0] is error
    for other in raised[1:]:
        assert type(other) is type(error) and str(other) == str(error)
        assert isinstance(other.__cause__, PeerError) and "Traceback" in str(other.__cause__)
    if isinstance(error, ConfigError):
        assert all(isinstance(other, ConfigError) and len(other.problems) == 1 for other in raised)


def test_error_of_a_foreign_class_reaches_the_others_as_a_worker_error_that_quotes_it(tmp_path):
    class OwnError(Exception):
        pass

    def work(control: Control, rank: int) -> None:
        def make() -> None:
            raise OwnError("spilled")

        control.decide("data", make)

    first, second = (future.exception() for future in on_all_ranks(tmp_path, 2, work))
    assert isinstance(first, OwnError)
    assert type(second) is WorkerError and "OwnError: spilled" in str(second)


def test_decision_that_is_no_json_fails_on_all_ranks(tmp_path):
    raised = on_all_ranks(tmp_path, 2, lambda control, rank: control.decide("data", lambda: {1, 2}))
    assert [type(future.exception()) for future in raised] == [TypeError, TypeError]


def test_missing_ranks_are_named_with_what_they_were_doing(tmp_path):
    Heartbeat(activity_path(control_directory(tmp_path, "g1"), 2)).note("step 7: forward 1")
    notes: list[str] = []
    control = Control(tmp_path, "g1", 0, 3, timeout=0.2, note=notes.append)
    control.publish("ready", None)
    with pytest.raises(PeerError, match=r"for 'ready' from ranks 1, 2") as caught:
        control.collect("ready")
    assert "rank 2" in str(caught.value) and "step 7: forward 1" in str(caught.value)
    assert notes == ["wait for 'ready' from ranks 1, 2"]


def test_a_rank_that_shows_signs_of_life_is_waited_for_beyond_the_timeout(tmp_path):
    heartbeat = Heartbeat(activity_path(control_directory(tmp_path, "g1"), 1))
    control = Control(tmp_path, "g1", 0, 2, timeout=0.4)

    def late() -> None:
        for number in range(8):
            time.sleep(0.15)
            heartbeat.note(f"tokenise part {number}")
        Control(tmp_path, "g1", 1, 2).publish("ready", "at last")

    thread = threading.Thread(target=late)
    thread.start()
    control.publish("ready", "soon")
    assert control.collect("ready") == ["soon", "at last"]
    thread.join()


def test_a_key_is_used_once_and_names_a_file(tmp_path):
    control = Control(tmp_path, "g1", 0, 1)
    control.publish("ready", 1)
    with pytest.raises(ValueError, match="used before"):
        control.publish("ready", 2)
    for key in ("../outside", "a/b", "", ".hidden", "nul\0"):
        with pytest.raises(ValueError, match="can't be a file name"):
            control.publish(key, 1)
    with pytest.raises(ValueError, match="directly after publishing"):
        control.collect("another")
    assert sorted(path.name for path in tmp_path.rglob("*.json")) == ["ready.rank-0.json"]


def test_files_of_what_all_ranks_have_passed_are_removed(tmp_path):
    def work(control: Control, rank: int) -> None:
        for step in range(20):
            control.publish(f"part-{step}", rank)
            if rank == 0:
                control.collect(f"part-{step}")
            control.decide(f"committed-{step}", lambda step=step: step)
        control.barrier("end")

    for future in on_all_ranks(tmp_path, 3, work):
        future.result()
    names = {path.name.split(".")[0] for path in control_directory(tmp_path, "g1").iterdir()}
    assert names == {"end"}


def test_generations_do_not_see_each_other(tmp_path):
    old = Control(tmp_path, "old", 1, 2)
    old.publish("ready", "stale")
    new = Control(tmp_path, "new", 0, 2, timeout=0.1)
    new.publish("ready", "fresh")
    with pytest.raises(PeerError):
        new.collect("ready")
    assert len(list(control_directory(tmp_path, "old").iterdir())) == 1


def test_stop_is_seen_after_it_was_requested(tmp_path):
    control = Control(tmp_path, "g1", 0, 1)
    assert not control.stop_requested
    request_stop(tmp_path, "g1")
    assert control.stop_requested


def test_processes_agree_under_the_launcher(tmp_path):
    command = worker_command(
        tmp_path,
        """
        from mpsdk.launch import Control, generation_from_environment, run_directory_from_environment
        control = Control(run_directory_from_environment(), generation_from_environment(), rank, 3, 10, note)
        for step in range(50):
            control.publish(f"part-{step}", rank * step)
            assert control.collect(f"part-{step}") == [0, step, 2 * step]
            assert control.decide(f"next-{step}", lambda: os.getpid()) != (os.getpid() if rank else None)
        """,
    )
    LocalLauncher(timeout=20, command=command).run("job", world_size=3, run_directory=tmp_path / "run")


def test_error_in_a_decision_is_reported_as_rank_0s_own(tmp_path):
    command = worker_command(
        tmp_path,
        """
        from mpsdk.launch import Control, generation_from_environment, run_directory_from_environment
        control = Control(run_directory_from_environment(), generation_from_environment(), rank, 2, 10, note)
        def make():
            raise ValueError("corpus.txt is empty")
        control.decide("data", make)
        """,
    )
    with pytest.raises(WorkerError, match=r"rank 0 of 2 failed with ValueError: corpus\.txt is empty"):
        LocalLauncher(timeout=20, command=command).run("job", world_size=2, run_directory=tmp_path / "run")
