"""What happens to the workers when it is the launcher that is interrupted, ended or killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.launch.processes import MARK, marked, wait_until_gone
from tests.launch.scripts import ROOT, worker_command

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks for processes in /proc")

_LAUNCHER = """\
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where a shell started the tests in the background
sys.path.insert(0, {root!r})
from mpsdk.launch import LocalLauncher

try:
    LocalLauncher(command={command!r}).run("job", world_size=2, run_directory={run!r})
except KeyboardInterrupt:
    print("interrupted")
    raise
except SystemExit as leaving:
    print("leaving", leaving.code)
    raise
"""

_BODY = """
import subprocess
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
{prepare}
open(f"{directory}/ready-{{rank}}", "w").close()
time.sleep(60)
"""


@pytest.fixture
def launcher(tmp_path):
    """Starts a launcher whose two workers, each with a child, run for a minute; returns when they all do."""
    started: list[subprocess.Popen[str]] = []

    def start(prepare: str = "") -> subprocess.Popen[str]:
        command = list(worker_command(tmp_path, _BODY.format(prepare=prepare, directory=tmp_path)))
        program = _LAUNCHER.format(root=str(ROOT), command=command, run=str(tmp_path / "run"))
        process = subprocess.Popen(
            [sys.executable, "-c", program],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, MARK: str(tmp_path)},
            start_new_session=True,
        )
        started.append(process)
        deadline = time.monotonic() + 30
        while len(list(tmp_path.glob("ready-*"))) < 2 and time.monotonic() < deadline:
            time.sleep(0.02)
        assert (
            len(marked(str(tmp_path))) == 1 + 1 + 2 * 2
        )  # launcher, guardian, two workers with a child each
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()
    assert wait_until_gone(str(tmp_path)) == []


def ended(process: subprocess.Popen[str], tmp_path: Path, *, within: float) -> tuple[int, str]:
    started = time.monotonic()
    output, _ = process.communicate(timeout=30)
    assert wait_until_gone(str(tmp_path)) == []
    assert time.monotonic() - started < within
    assert list(tmp_path.glob("run/control/*")) == []
    return process.returncode, output


def test_ctrl_c_ends_all_workers(launcher, tmp_path):
    process = launcher()
    process.send_signal(signal.SIGINT)
    code, output = ended(process, tmp_path, within=8)
    assert output == "interrupted\n" and code in (1, 130, -signal.SIGINT)


def test_sigterm_ends_all_workers(launcher, tmp_path):
    process = launcher()
    process.send_signal(signal.SIGTERM)
    assert ended(process, tmp_path, within=8) == (143, "leaving 143\n")


def test_a_second_ctrl_c_waits_for_no_worker(launcher, tmp_path):
    process = launcher("signal.signal(signal.SIGTERM, signal.SIG_IGN)")
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    _, output = ended(process, tmp_path, within=2.5)  # SIGKILL comes 3 s after SIGTERM otherwise
    assert output == "interrupted\n"


def test_a_killed_launcher_leaves_no_process(launcher, tmp_path):
    process = launcher("signal.signal(signal.SIGTERM, signal.SIG_IGN)")
    process.kill()
    process.wait()
    assert wait_until_gone(str(tmp_path), seconds=5) == []


def test_a_worker_whose_launcher_died_before_it_could_ask_for_the_signal_ends_itself(tmp_path):
    command = worker_command(tmp_path, "print('worked')")
    environment = {**os.environ, "MPSDK_LAUNCHER_PID": "1"}
    result = subprocess.run([*command, "job"], env=environment, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (-signal.SIGKILL, "")


def test_a_worker_without_a_launcher_runs_alone(tmp_path):
    command = worker_command(tmp_path, "note('alone'); print(rank, place.world_size)")
    result = subprocess.run([*command, "job"], capture_output=True, text=True, check=True)
    assert result.stdout == "0 1\n"
