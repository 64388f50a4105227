"""Contenders side by side: all are built first, then they take turns, so that a slow minute of the machine hits all alike.

Every contender has processes of its own, which sleep while another's turn is on. A turn is a few steps and one look at
the loss; a round gives each contender one turn, in an order that rotates. What counts are the ratios within a round.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import time
import traceback
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.contenders import TORCH, Contender, Seat, framework
from benchmarks.ranks import Worker, end
from benchmarks.sizes import Size

ANSWER_TIMEOUT = 600.0  # seconds


@dataclass(frozen=True)
class Entry:
    """A contender by name, and where the function that makes it is: "module:function" under benchmarks.contenders."""

    name: str
    make: str
    options: dict[str, object] = field(default_factory=dict)


@dataclass
class Result:
    """What was seen of one contender: seconds a step of each round, peak memory in bytes of the fullest process, losses."""

    entry: Entry
    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    memory: int = 0


def compete(
    entries: list[Entry], size: Size, *, world_size: int, threads: int, rounds: int, model: str
) -> list[Result]:
    """Let `entries` train the same model on the same batches, `world_size` processes of `threads` threads each."""
    results = [Result(entry) for entry in entries]
    with TemporaryDirectory(prefix="mpsdk-bench-") as directory:
        teams = [_Team(entry, size, world_size, threads, model, directory) for entry in entries]
        try:
            for team in teams:
                team.ask("build")
            for number in range(-1, rounds):  # round -1 warms up
                for index in _rotated(len(teams), number):
                    seconds, losses = zip(*teams[index].ask("steps"), strict=True)
                    results[index].losses.append(losses[0])
                    if number >= 0:
                        results[index].seconds.append(max(seconds) / size.steps)
            for team, result in zip(teams, results, strict=True):
                result.memory = max(team.ask("memory"))
        finally:
            for team in teams:
                team.close()
    return results


def _rotated(count: int, by: int) -> list[int]:
    return [(index + by) % count for index in range(count)]


class _Team:
    """One contender's processes."""

    def __init__(
        self, entry: Entry, size: Size, world_size: int, threads: int, model: str, directory: str
    ) -> None:
        context = multiprocessing.get_context("spawn")
        os.environ["OMP_NUM_THREADS"] = str(threads)
        store = str(Path(directory, f"store-{entry.name.replace(' ', '-')}"))
        self.entry = entry
        self._workers: list[Worker] = []
        for rank in range(world_size):
            here, there = context.Pipe()
            seat = Seat(rank, world_size, store, size, model, entry.options)
            process = context.Process(target=_serve, args=(there, entry.make, seat, threads), daemon=True)
            process.start()
            there.close()
            self._workers.append((process, here))

    def ask(self, what: str) -> list[Any]:
        """The answers of all ranks."""
        for _, connection in self._workers:
            connection.send(what)
        return [self._answer(rank, connection) for rank, (_, connection) in enumerate(self._workers)]

    def _answer(self, rank: int, connection: Connection) -> Any:
        if not connection.poll(ANSWER_TIMEOUT):
            raise RuntimeError(f"{self.entry.name}: rank {rank} gave no answer in {ANSWER_TIMEOUT} s")
        failed, answer = connection.recv()
        if failed:
            raise RuntimeError(f"{self.entry.name}: rank {rank} failed\n{answer}")
        return answer

    def close(self) -> None:
        end(self._workers)


def _serve(connection: Connection, make: str, seat: Seat, threads: int) -> None:
    """One process: answer the team's questions until the pipe closes."""
    os.environ.update(KERAS_BACKEND="tensorflow", TF_CPP_MIN_LOG_LEVEL="2", CUDA_VISIBLE_DEVICES="-1")
    _take_threads(framework(make), threads)
    os.environ.update(RANK=str(seat.rank), WORLD_SIZE=str(seat.world_size), LOCAL_RANK=str(seat.rank))
    os.environ.update(MASTER_ADDR="127.0.0.1", GLOO_SOCKET_IFNAME="lo")
    worker = _Worker(make, seat)
    while True:
        try:
            what = connection.recv()
        except EOFError:
            return
        try:
            answer = (False, getattr(worker, what)())
        except Exception:
            answer = (True, traceback.format_exc())
        connection.send(answer)


def _take_threads(framework: str, threads: int) -> None:
    """As many threads as the match has, for every contender of a framework alike.

    TensorFlow has two pools: one that an operation's work is cut over, and one that operations wait and run side by side
    in. Collectives need two of the second.
    """
    if framework == TORCH:
        import torch

        torch.set_num_threads(threads)
    else:
        import tensorflow as tf

        tf.config.threading.set_intra_op_parallelism_threads(threads)
        tf.config.threading.set_inter_op_parallelism_threads(max(2, threads))


class _Worker:
    def __init__(self, make: str, seat: Seat) -> None:
        self._make, self._seat = make, seat
        self._contender: Contender | None = None
        self._taken = 0
        self._before = 0

    def build(self) -> None:
        module, _, function = self._make.partition(":")
        make = getattr(importlib.import_module(f"benchmarks.contenders.{module}"), function)
        Path("/proc/self/clear_refs").write_text("5")  # from here on VmHWM is the peak of what follows
        self._before = _status("VmRSS")
        self._contender = make(self._seat)

    def steps(self) -> tuple[float, float]:
        """Seconds that a turn took, and the loss of its last step."""
        assert self._contender is not None
        begin = time.perf_counter()
        for _ in range(self._seat.size.steps):
            self._contender.step(self._taken)
            self._taken += 1
        loss = self._contender.loss()
        return time.perf_counter() - begin, loss

    def memory(self) -> int:
        """Resident bytes at the peak, over those of the loaded libraries."""
        return _status("VmHWM") - self._before


def _status(field: str) -> int:
    """A figure of Linux's /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")
