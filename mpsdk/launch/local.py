"""Workers as processes of this machine, watched until all have finished or one of them has to be explained."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any

from mpsdk.errors import WorkerError
from mpsdk.launch.control import control_directory, request_stop
from mpsdk.launch.environment import DEFAULT_TIMEOUT, new_generation, worker_environment
from mpsdk.launch.interruption import Interruption
from mpsdk.launch.processes import Group
from mpsdk.launch.watch import Watch

_log = logging.getLogger(__name__)

Event = dict[str, Any]

_POLL_SECONDS = 0.05
_BACKSTOP_SECONDS = 10.0  # the ranks' own patience beyond the launcher's, whose report says more


class LocalLauncher:
    """Runs the ranks of a job as processes of this machine, over the loopback interface only.

    Args:
        processes: how many ranks; None: one a GPU, or without GPUs what the distribution's stated degrees ask for.
        timeout: seconds for which a rank may show no progress, and by which ranks may finish apart.
        grace: seconds that a worker has to end after SIGTERM, before SIGKILL.
        command: what to run in place of `python -m mpsdk.worker`; the job's path is appended.
    """

    def __init__(
        self,
        processes: int | None = None,
        timeout: float = DEFAULT_TIMEOUT,
        *,
        grace: float = 3.0,
        command: Sequence[str] | None = None,
    ) -> None:
        if processes is not None and processes < 1:
            raise ValueError(f"processes must be at least 1. Received: {processes}")
        if not timeout > 0:
            raise ValueError(f"timeout must be a positive number of seconds. Received: {timeout}")
        self.processes = processes
        self.timeout = timeout
        self._grace = grace
        self._command = list(command) if command else [sys.executable, "-m", "mpsdk.worker"]

    def world_size(self, stated_degree: int) -> int:
        """How many ranks `run` should start for a distribution whose stated degrees multiply to `stated_degree`."""
        return self.processes or visible_gpus() or stated_degree

    def run(
        self,
        job_path: str | os.PathLike[str],
        *,
        world_size: int,
        run_directory: str | os.PathLike[str],
        on_event: Callable[[Event], object] | None = None,
    ) -> None:
        """Run the job on `world_size` ranks and return when all have finished.

        Every line that the ranks append to `run_directory/events.jsonl` goes to `on_event`; when that returns
        "stop", the ranks are asked to stop after their present step. Each rank's output is in
        `run_directory/logs/rank-N.log`.

        Raises WorkerError, with the root cause on top, when a rank fails, is killed, hangs or leaves the
        others alone, and when another launcher is at work in `run_directory`. However it ends, no process is
        left.
        """
        directory = Path(run_directory).resolve()
        logs = directory / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        generation = new_generation()
        with (
            alone_in(directory),
            _control_files(directory, generation) as control,
            Interruption() as interruption,
            Group(grace=self._grace) as group,
        ):
            shutil.rmtree(directory / "errors", ignore_errors=True)  # of an earlier start
            events = _Events(directory / "events.jsonl", on_event)
            for rank in range(world_size):
                place = worker_environment(
                    rank=rank,
                    world_size=world_size,
                    run_directory=directory,
                    generation=generation,
                    timeout=self.timeout + _BACKSTOP_SECONDS,
                    store=control / "store",
                )
                environment = {**_defaults(world_size), **os.environ, **place}
                group.start([*self._command, str(job_path)], environment, logs / f"rank-{rank}.log")
            watch = Watch(group, directory, generation, self.timeout)
            while True:
                finished = not group.running
                if events.deliver() == "stop":
                    request_stop(directory, generation)
                interruption.check()
                if reason := watch.reason_to_end():
                    raise WorkerError(reason)
                if finished:
                    return
                time.sleep(_POLL_SECONDS)


class _Events:
    """The lines that ranks append to the event file, from the end that it had at the start."""

    def __init__(self, path: Path, on_event: Callable[[Event], object] | None) -> None:
        self._path = path
        self._on_event = on_event
        self._position = path.stat().st_size if path.exists() else 0

    def deliver(self) -> object:
        """Pass on what has come in whole lines; "stop" when one of the calls returned that."""
        if self._on_event is None or not self._path.exists():
            return None
        with self._path.open("rb") as file:
            file.seek(self._position)
            whole, newline, _ = file.read().rpartition(b"\n")
        self._position += len(whole) + len(newline)
        answers: list[object] = []
        for line in whole.splitlines():
            try:
                event = json.loads(line)
            except ValueError:
                _log.warning("%s: not a JSON line, left out: %r", self._path, line[:200])
                continue
            answers.append(self._on_event(event))
        return "stop" if "stop" in answers else None


@contextlib.contextmanager
def alone_in(directory: Path) -> Generator[None]:
    """Hold the run directory against a second launcher; the kernel lets go of it if this process dies.

    Raises WorkerError when it is held already.
    """
    with (directory / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise WorkerError(
                f"another launcher is at work in {directory}; wait for it to end, or choose another output_dir"
            ) from error
        except OSError as error:  # a file system without locks
            _log.warning("nothing keeps another run out of %s: %s", directory, error)
        yield


@contextlib.contextmanager
def _control_files(directory: Path, generation: str) -> Generator[Path]:
    control = control_directory(directory, generation)
    control.mkdir(parents=True)
    try:
        yield control
    finally:
        shutil.rmtree(control, ignore_errors=True)


def _defaults(world_size: int) -> dict[str, str]:
    """What the workers' environment holds unless the user's says otherwise."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    loopback = "lo" if sys.platform.startswith("linux") else "lo0"
    return {
        "OMP_NUM_THREADS": str(max(1, cores // world_size)),
        "GLOO_SOCKET_IFNAME": loopback,
        "NCCL_SOCKET_IFNAME": loopback,
        "PYTHONUNBUFFERED": "1",
    }


def visible_gpus() -> int:
    """How many NVIDIA GPUs a framework would find, asked without importing one."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        devices = [device.strip() for device in chosen.split(",")]
        return len([device for device in devices if device and not device.startswith("-")])
    try:
        listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return 0
    return sum(line.startswith("GPU ") for line in listing.stdout.splitlines())
