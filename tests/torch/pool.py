"""Worker processes that start once and run many cases, each case with a fresh process group of its own size.

Importing torch takes seconds and joining takes milliseconds, so a test session keeps eight processes and gives each
case to the first `world_size` of them.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from mpsdk.backend import Place

CASE_TIMEOUT = 240.0  # seconds; a case takes a few, on a busy machine
CORES = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []


class CaseError(AssertionError):
    """A case raised on some rank; the first rank's traceback comes first."""


class WorkerPool:
    """`size` processes. `run` gives a case to some of them and returns what each rank returned."""

    def __init__(self, size: int) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["mpsdk_torch.backend"])  # imported once, not by each of the eight
        os.environ["OMP_NUM_THREADS"] = "1"
        self._directory = Path(tempfile.mkdtemp(prefix="mpsdk-pool-"))
        self._cases = 0
        self._workers: list[tuple[Any, Connection]] = []
        for _ in range(size):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(there,), daemon=True)
            process.start()
            self._workers.append((process, here))

    def run(self, world_size: int, case: Callable[..., Any], *arguments: Any) -> list[Any]:
        """`case(place, *arguments)` on ranks 0 .. world_size - 1."""
        self._cases += 1
        store = str(self._directory / f"store-{self._cases}")
        chosen = self._workers[:world_size]
        for rank, (_, connection) in enumerate(chosen):
            place = {"rank": rank, "world_size": world_size, "store": store, "timeout": CASE_TIMEOUT / 2}
            connection.send((case, place, arguments))
        answers: list[Any] = []
        failures: list[str] = []
        for rank, (_, connection) in enumerate(chosen):
            if not connection.poll(CASE_TIMEOUT):
                self.close()
                raise CaseError(f"rank {rank} gave no answer in {CASE_TIMEOUT} s\n" + "\n".join(failures))
            failed, answer = connection.recv()
            if failed:
                failures.append(f"rank {rank}:\n{answer}")
            answers.append(answer)
        if failures:
            raise CaseError("\n".join(failures))
        return answers

    def close(self) -> None:
        for _, connection in self._workers:
            connection.close()  # an idle worker ends by itself, and leaves what coverage saw
        patience = time.monotonic() + 10
        for process, _ in self._workers:
            process.join(max(0.0, patience - time.monotonic()))
            if process.is_alive():
                process.kill()


def _serve(connection: Connection) -> None:
    import torch

    torch.set_num_threads(1)
    gc.freeze()  # makes the collections below quick
    while True:
        try:
            case, place, arguments = connection.recv()
        except EOFError:
            return
        try:
            _stay_on_a_core(place["rank"])
            answer = (False, case(Place(**place), *arguments))
        except Exception:
            answer = (True, traceback.format_exc())
            import torch.distributed as dist

            if dist.is_initialized():
                dist.destroy_process_group()
        connection.send(answer)
        del answer
        gc.collect()  # a process group that is left to the cycle collector keeps a thread that polls its sockets


def _stay_on_a_core(rank: int) -> None:
    """Ranks that wander between a few cores wait for each other up to twice as long as ranks that stay where they are."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {CORES[rank % len(CORES)]})
