"""The processes of one run: started together, ended together, also when their launcher is killed."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

_log = logging.getLogger(__name__)

# Reads process groups, one a line, and kills them when the pipe closes: when the launcher is gone. The
# kernel's parent death signal reaches only the workers themselves, and only on Linux; this reaches what they
# started, too.
_GUARDIAN = 'while read -r group; do set -- "$@" "-$group"; done; [ $# -gt 0 ] && kill -s KILL -- "$@"'

_POLL_SECONDS = 0.02
_STACK_SECONDS = 2.0
_STACK = re.compile(
    r"(?:Current thread|Thread) 0x[0-9a-f]+[^\n]*\(most recent call first\):\n((?:  [^\n]*\n)+)"
)


class Worker:
    """The process of one rank, leader of its own session and process group, writing to its own log."""

    def __init__(self, rank: int, command: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
        self.rank = rank
        self.log = log
        self.started = time.monotonic()
        self.ended_at: float | None = None  # seconds since the epoch
        with log.open("ab") as output:
            self._log_start = output.tell()
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=dict(environment),
                start_new_session=True,
            )
        self.pid = self._process.pid

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while the process runs."""
        code = self._process.poll()
        if code is not None and self.ended_at is None:
            self.ended_at = time.time()
            self._signal_group(signal.SIGKILL)  # what the rank started and left behind
        return code

    def signal(self, number: int) -> None:
        """Send a signal to the rank and to what it started, if it still runs."""
        if self.poll() is None:
            self._signal_group(number)

    def log_tail(self, limit: int = 16_384) -> str:
        """The end of what this start of the rank has written, at most `limit` bytes."""
        with self.log.open("rb") as file:
            end = file.seek(0, os.SEEK_END)
            file.seek(max(self._log_start, end - limit))
            return file.read().decode(errors="replace")

    def ask_for_stack(self) -> int:
        """Have the rank print its stack to its log; gives the log's size before that, for `stack_since`."""
        size = self.log.stat().st_size
        if self.poll() is None:
            os.kill(self.pid, signal.SIGUSR1)
        return size

    def stack_since(self, size: int) -> str:
        """The stack of the main thread (faulthandler prints it last), from what the log has grown; "" if none came."""
        with self.log.open("rb") as file:
            file.seek(size)
            found = _STACK.findall(file.read().decode(errors="replace"))
        return str(found[-1]) if found else ""

    def _signal_group(self, number: int) -> None:
        # PermissionError: macOS says so of a group that holds only zombies.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, number)


class Group:
    """All workers of a run. As a context manager it leaves none of them running, however the block ends.

    Args:
        grace: seconds between SIGTERM and SIGKILL.
    """

    def __init__(self, *, grace: float) -> None:
        self.workers: list[Worker] = []
        self._grace = grace

    def __enter__(self) -> Self:
        self._guardian = subprocess.Popen(
            ["/bin/sh", "-c", _GUARDIAN, "guardian"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._end()
        finally:
            # A second Ctrl-C lands here: no more patience.
            for worker in self.workers:
                worker.signal(signal.SIGKILL)
            self._wait_for_end(seconds=5.0)
            self._guardian.kill()
            self._guardian.communicate()
        for worker in self.workers:
            if worker.poll() is None:
                _log.warning("rank %d (process %d) does not die of SIGKILL", worker.rank, worker.pid)

    def start(self, command: Sequence[str], environment: Mapping[str, str], log: Path) -> Worker:
        """Start the next rank."""
        worker = Worker(len(self.workers), command, environment, log)
        self.workers.append(worker)
        assert self._guardian.stdin is not None
        self._guardian.stdin.write(f"{worker.pid}\n".encode())
        self._guardian.stdin.flush()
        return worker

    @property
    def running(self) -> list[Worker]:
        return [worker for worker in self.workers if worker.poll() is None]

    def stacks(self, ranks: Sequence[int]) -> dict[int, str]:
        """The Python stacks of these ranks; "" for one that prints none in time."""
        asked = {rank: self.workers[rank].ask_for_stack() for rank in ranks}
        deadline = time.monotonic() + _STACK_SECONDS
        found: dict[int, str] = {}
        while time.monotonic() < deadline and len(found) < len(asked):
            time.sleep(0.1)
            for rank, size in asked.items():
                if stack := self.workers[rank].stack_since(size):
                    found[rank] = stack
        return {rank: found.get(rank, "") for rank in ranks}

    def _end(self) -> None:
        for worker in self.workers:
            worker.signal(signal.SIGTERM)
        self._wait_for_end(seconds=self._grace)

    def _wait_for_end(self, *, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while self.running and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)
