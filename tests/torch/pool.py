"""Worker processes that start once and run many cases, each case with a fresh process group of its own size.

Importing torch takes seconds and joining takes milliseconds, so a test session keeps eight processes and gives each
case to the first `world_size` of them.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from mpsdk.backend import Place

CASE_TIMEOUT = 240.0  # seconds; a case takes a few, on a busy machine


class CaseError(AssertionError):
    """A case raised on some rank; the first rank's traceback comes first."""


class WorkerPool:
    """`size` processes. `run` gives a case to some of them and returns what each rank returned."""

    def __init__(self, size: int) -> None:
        context = multiprocessing.get_context("spawn")
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
        for process, connection in self._workers:
            connection.close()
            process.terminate()
        for process, _ in self._workers:
            process.join(5)
            if process.is_alive():
                process.kill()


def _serve(connection: Connection) -> None:
    import torch

    torch.set_num_threads(1)
    while True:
        try:
            case, place, arguments = connection.recv()
        except EOFError:
            return
        try:
            answer = (False, case(Place(**place), *arguments))
        except Exception:
            answer = (True, traceback.format_exc())
            import torch.distributed as dist

            if dist.is_initialized():
                dist.destroy_process_group()
        connection.send(answer)
