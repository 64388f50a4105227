"""What the local launcher promises: results come back, failures are explained, nothing is left behind."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import pytest

from mpsdk.errors import ConfigError, WorkerError
from mpsdk.launch import Launcher, LocalLauncher, get_launcher
from tests.launch.processes import MARK, wait_until_gone
from tests.launch.scripts import worker_command

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks for processes in /proc")


@pytest.fixture(autouse=True)
def mark(tmp_path, monkeypatch):
    """A mark that every process of the test inherits; afterwards none of them may be left."""
    monkeypatch.setenv(MARK, str(tmp_path))
    yield str(tmp_path)
    assert wait_until_gone(str(tmp_path)) == []
    assert list(tmp_path.glob("run/control/*")) == []


def run(tmp_path: Path, body: str, *, world_size: int = 2, timeout: float = 20.0, on_event=None) -> None:
    launcher = LocalLauncher(timeout=timeout, command=worker_command(tmp_path, body))
    launcher.run(
        tmp_path / "job.json", world_size=world_size, run_directory=tmp_path / "run", on_event=on_event
    )


def report_of(tmp_path: Path, body: str, *, within: float, **options) -> str:
    """The text of the WorkerError that the run ends with, inside so many seconds."""
    started = time.monotonic()
    with pytest.raises(WorkerError) as caught:
        run(tmp_path, body, **options)
    assert time.monotonic() - started < within
    return str(caught.value)


def test_ranks_run_with_their_place_and_write_their_own_logs(tmp_path):
    run(
        tmp_path,
        "print(rank, place.world_size, place.local_rank, sys.argv[1:], os.path.exists(os.path.dirname(place.store)))",
    )
    job = str(tmp_path / "job.json")
    for rank in range(2):
        assert (tmp_path / f"run/logs/rank-{rank}.log").read_text() == f"{rank} 2 {rank} ['{job}'] True\n"


def test_workers_use_the_loopback_interface_and_their_share_of_the_cores(tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    body = "print(os.environ['OMP_NUM_THREADS'], os.environ['GLOO_SOCKET_IFNAME'])"
    run(tmp_path, body)
    share = max(1, len(os.sched_getaffinity(0)) // 2)
    assert (tmp_path / "run/logs/rank-0.log").read_text() == f"{share} lo\n"
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    run(tmp_path, body)
    assert (tmp_path / "run/logs/rank-0.log").read_text() == f"{share} lo\n7 lo\n"


def test_events_are_passed_on_in_order_and_only_those_of_this_start(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/events.jsonl").write_text('{"event": "old"}\n')
    body = """
    if rank == 0:
        with open(os.environ["MPSDK_RUN_DIRECTORY"] + "/events.jsonl", "a") as file:
            for step in range(5):
                file.write('{"event": "log", "step": %d' % step); file.flush(); time.sleep(0.06)
                file.write('}\\nnot json\\n'); file.flush()
    """
    events: list[dict] = []
    run(tmp_path, body, on_event=events.append)
    assert events == [{"event": "log", "step": step} for step in range(5)]


def test_a_stop_that_an_event_asks_for_reaches_the_ranks(tmp_path):
    body = """
    from mpsdk.launch import Control, generation_from_environment, run_directory_from_environment
    control = Control(run_directory_from_environment(), generation_from_environment(), rank, 2)
    if rank == 0:
        with open(os.environ["MPSDK_RUN_DIRECTORY"] + "/events.jsonl", "a") as file:
            file.write('{"event": "log", "step": 1}\\n')
    while not control.stop_requested:
        note("spin"); time.sleep(0.02)
    """
    run(tmp_path, body, on_event=lambda event: "stop")


def test_an_error_in_on_event_ends_the_run(tmp_path):
    body = """
    with open(os.environ["MPSDK_RUN_DIRECTORY"] + "/events.jsonl", "a") as file:
        file.write('{"event": "log"}\\n')
    time.sleep(60)
    """

    def fail(event: dict) -> None:
        raise ZeroDivisionError("in a callback")

    with pytest.raises(ZeroDivisionError, match="in a callback"):
        run(tmp_path, body, on_event=fail)


def test_a_rank_that_raises_has_its_traceback_on_top(tmp_path):
    body = """
    note("step 3: forward 2")
    if rank == 1:
        raise ValueError("loss is not finite")
    note("step 3: receive activation 2 from stage 1")
    time.sleep(60)
    """
    report = report_of(tmp_path, body, within=10)
    lines = report.splitlines()
    assert lines[0] == "rank 1 of 2 failed with ValueError: loss is not finite"
    assert lines[1] == "while: step 3: forward 2"
    assert lines[3] == "Traceback (most recent call last):"
    assert lines[4].endswith("in main")
    assert "logs: " + str(tmp_path / "run/logs") in report
    error = json.loads((tmp_path / "run/errors/rank-1.json").read_text())
    assert (error["rank"], error["type"], error["message"]) == (1, "ValueError", "loss is not finite")
    assert "Traceback" in (tmp_path / "run/logs/rank-1.log").read_text()


def test_a_killed_rank_is_the_cause_and_not_the_peer_that_lost_it(tmp_path):
    body = """
    note("step 3: backward 0")
    def wait_for(path):
        while not os.path.exists(os.environ["MPSDK_RUN_DIRECTORY"] + path):
            time.sleep(0.01)
    if rank == 1:
        open(os.environ["MPSDK_RUN_DIRECTORY"] + "/begun", "w").close()
        wait_for("/errors/rank-0.json")
        os.kill(os.getpid(), signal.SIGKILL)
    wait_for("/begun")
    raise ConnectionResetError("Connection reset by peer")
    """
    report = report_of(tmp_path, body, within=10)
    assert report.startswith("rank 1 of 2 was killed by SIGKILL (signal 9), while: step 3: backward 0\n")
    assert "memory" in report
    assert "rank 0  failed with ConnectionResetError" in report


def test_a_crash_in_native_code_shows_where_python_was(tmp_path):
    report = report_of(tmp_path, "os.kill(os.getpid(), signal.SIGSEGV)", within=10, world_size=1)
    assert report.startswith("rank 0 of 1 was killed by SIGSEGV (signal 11)")
    assert "Fatal Python error: Segmentation fault" in report and "in main" in report


def test_a_hung_rank_is_named_with_its_stack_and_what_the_others_did(tmp_path):
    body = """
    note("step 3: receive activation 2 from stage 1")
    def stuck_here():
        note("step 3: forward 2")
        time.sleep(60)
    if rank == 1:
        stuck_here()
    time.sleep(60)
    """
    report = report_of(tmp_path, body, within=15, timeout=1.5)
    first, rest = report.split("\n", 1)
    assert first.startswith("rank 1 of 2 hung: nothing new for 1.")
    assert first.endswith("(timeout 1.5 s), while: step 3: forward 2")
    own_stack, others = rest.split("all ranks when the run was given up:")
    assert "in stuck_here" in own_stack
    assert "step 3: receive activation 2 from stage 1" in others and "in main" in others
    assert "in stuck_here" in (tmp_path / "run/logs/rank-1.log").read_text()


def test_a_stopped_rank_is_ended_too(tmp_path):
    body = """
    note("step 3: forward 2")
    if rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    note("step 3: wait for rank 1")
    time.sleep(60)
    """
    report = report_of(tmp_path, body, within=20, timeout=1.5)
    assert report.startswith("rank 1 of 2 hung")
    assert "stopped (SIGSTOP)" in report


def test_a_rank_that_waits_is_not_hung_while_another_moves(tmp_path):
    body = """
    written = os.environ["MPSDK_RUN_DIRECTORY"] + "/written"
    if rank == 1:
        note("wait for the checkpoint from rank 0")
        while not os.path.exists(written):
            time.sleep(0.1)
    else:
        for part in range(30):
            note(f"write part {part}")
            time.sleep(0.1)
        open(written, "w").close()
    """
    run(tmp_path, body, timeout=2.0)


def test_a_rank_has_longer_than_the_timeout_to_import_its_framework(tmp_path):
    run(tmp_path, "time.sleep(1.5); note('step 1: forward 0')", world_size=1, timeout=1.0)


def test_a_rank_that_others_gave_up_on_is_named_before_their_errors(tmp_path):
    body = """
    note("step 3: forward 2")
    if rank == 0:
        note("step 3: receive activation 2 from stage 1")
        time.sleep(1)
        raise RuntimeError("unbound_buffer.cc:81] Timed out waiting 1000ms for recv operation to complete")
    time.sleep(60)
    """
    report = report_of(tmp_path, body, within=15)
    assert report.startswith("rank 1 of 2 seems to hang: nothing new for ")
    assert "while: step 3: forward 2\nrank 0 gave up on it:" in report
    assert "rank 0 of 2 failed with RuntimeError: unbound_buffer.cc:81] Timed out waiting" in report
    assert "its Python stack" in report


def test_a_program_without_heartbeat_is_not_judged_by_its_silence(tmp_path):
    LocalLauncher(timeout=0.3, command=[sys.executable, "-c", "import time; time.sleep(1)"]).run(
        "job", world_size=1, run_directory=tmp_path / "run"
    )


def test_an_import_error_at_the_start_is_shown(tmp_path):
    report = report_of(tmp_path, "import no_such_module_anywhere", within=10)
    assert "ModuleNotFoundError: No module named 'no_such_module_anywhere'" in report.splitlines()[0]


def test_a_program_that_fails_before_its_guard_shows_the_end_of_its_log(tmp_path):
    launcher = LocalLauncher(command=[sys.executable, "-c", "import no_such_module_anywhere"])
    with pytest.raises(WorkerError) as caught:
        launcher.run("job", world_size=1, run_directory=tmp_path / "run")
    assert str(caught.value).startswith("rank 0 of 1 ended with exit code 1, while: not in Python yet")
    assert "ModuleNotFoundError" in str(caught.value)


def test_a_rank_that_leaves_in_the_middle_is_noticed(tmp_path):
    body = """
    note("step 3: forward 2")
    if rank == 1:
        os._exit(0)
    while True:
        note("step 3: wait for rank 1"); time.sleep(0.05)
    """
    report = report_of(tmp_path, body, within=15, timeout=1.0)
    assert report.startswith("rank 1 of 2 left with exit code 0 before its work was done")
    assert "its last note: step 3: forward 2" in report


def test_ranks_that_never_follow_one_that_has_finished_are_ended(tmp_path):
    body = """
    while rank == 0:
        note("spin"); time.sleep(0.05)
    """
    report = report_of(tmp_path, body, within=15, timeout=1.5)
    assert "rank 1 of 2 left with exit code 0 and 2 s later others were still running" in report


def test_a_worker_that_ignores_sigterm_and_what_it_started_are_killed(tmp_path):
    body = """
    import subprocess
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    subprocess.Popen([sys.executable, "-c", "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(60)"])
    time.sleep(0.3)
    if rank == 1:
        raise ValueError("no")
    time.sleep(60)
    """
    assert "ValueError: no" in report_of(tmp_path, body, within=12)


def test_a_second_launcher_in_the_same_directory_is_refused(tmp_path):
    refused: list[str] = []

    def second(event: dict) -> None:
        with pytest.raises(WorkerError) as caught:
            LocalLauncher().run("job", world_size=1, run_directory=tmp_path / "run")
        refused.append(str(caught.value))

    body = """
    with open(os.environ["MPSDK_RUN_DIRECTORY"] + "/events.jsonl", "a") as file:
        file.write('{"event": "log"}\\n')
    """
    run(tmp_path, body, world_size=1, on_event=second)
    assert refused and "another launcher is at work" in refused[0]


def test_errors_of_an_earlier_start_are_not_taken_for_this_ones(tmp_path):
    report_of(tmp_path, "raise ValueError('first')", within=10)
    run(tmp_path, "pass")
    assert list((tmp_path / "run/errors").glob("*")) == []


def test_world_size_is_what_was_asked_for_else_the_gpus_else_the_stated_degrees(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert LocalLauncher().world_size(8) == 8
    assert LocalLauncher(processes=3).world_size(8) == 3
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,GPU-f00")
    assert LocalLauncher().world_size(8) == 3
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert LocalLauncher().world_size(8) == 8


@pytest.mark.parametrize("wrong", [{"processes": 0}, {"timeout": 0.0}, {"timeout": float("nan")}])
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be"):
        LocalLauncher(**wrong)


def test_launchers_are_found_by_name():
    launcher = get_launcher("local", processes=2, timeout=5.0)
    assert isinstance(launcher, LocalLauncher) and isinstance(launcher, Launcher)
    assert (launcher.processes, launcher.timeout) == (2, 5.0)
    assert get_launcher(launcher) is launcher
    with pytest.raises(ConfigError, match="did you mean 'local'"):
        get_launcher("locall")
    with pytest.raises(ConfigError, match="not with an object"):
        get_launcher(launcher, processes=2)
