"""Processes that start once and then measure one thing after another, each with a process group of its own size."""

from __future__ import annotations

import multiprocessing
import os
import traceback
from collections.abc import Callable, Iterable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from mpsdk.backend import Place

TIMEOUT = 300.0  # seconds that one measurement may take


Worker = tuple[BaseProcess, Connection]


def end(workers: Iterable[Worker]) -> None:
    """End processes, by force if they take long."""
    workers = list(workers)
    for process, connection in workers:
        connection.close()
        process.terminate()
    for process, _ in workers:
        process.join(5)
        if process.is_alive():
            process.kill()


def threads_of(processes: int) -> int:
    """Threads of each, as the local launcher sets them."""
    return max(1, len(os.sched_getaffinity(0)) // processes)


class Ranks:
    """`size` processes on this machine; a context manager, which ends them."""

    def __init__(self, size: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._directory = TemporaryDirectory(prefix="mpsdk-bench-")
        self._calls = 0
        self._workers: list[Worker] = []
        os.environ.update(OMP_NUM_THREADS=str(threads_of(1)), GLOO_SOCKET_IFNAME="lo")
        for _ in range(size):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(there,), daemon=True)
            process.start()
            there.close()
            self._workers.append((process, here))

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *exception: object) -> None:
        end(self._workers)
        self._directory.cleanup()

    def call(self, processes: int, function: Callable[..., Any], *arguments: object) -> list[Any]:
        """`function(place, *arguments)` in the first `processes` of them at once; what each returned.

        Raises RuntimeError with the traceback of a rank that failed.
        """
        self._calls += 1
        store = str(Path(self._directory.name, f"store-{self._calls}"))
        chosen = self._workers[:processes]
        for rank, (_, connection) in enumerate(chosen):
            place = {"rank": rank, "world_size": processes, "store": store, "timeout": TIMEOUT}
            connection.send((function, place, arguments))
        return [_answer(rank, connection) for rank, (_, connection) in enumerate(chosen)]


def _answer(rank: int, connection: Connection) -> Any:
    if not connection.poll(TIMEOUT):
        raise RuntimeError(f"rank {rank} gave no answer in {TIMEOUT:.0f} s")
    failed, answer = connection.recv()
    if failed:
        raise RuntimeError(f"rank {rank} failed\n{answer}")
    return answer


def _serve(connection: Connection) -> None:
    import torch

    while True:
        try:
            function, place, arguments = connection.recv()
        except EOFError:
            return
        torch.set_num_threads(threads_of(place["world_size"]))
        try:
            answer = (False, function(Place(**place), *arguments))
        except Exception:
            answer = (True, traceback.format_exc())
        connection.send(answer)
