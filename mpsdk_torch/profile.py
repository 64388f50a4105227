"""Measures one step of a rank: a trace of its operations, and when each action of the schedule began and ended.

The trace is torch's own (Kineto's).
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile, record_function

from mpsdk.backend import Place
from mpsdk.profile import WAIT, MeasuredSpan, RankSpans, compress_if_large, machine, trace_path
from mpsdk.schedule import Action, Kind
from mpsdk_torch.executor import Watch


class HostClock:
    """Where operations are done when their calls return."""

    def __init__(self) -> None:
        self.zero = time.perf_counter()

    def mark(self) -> float:
        return time.perf_counter()

    def seconds(self, mark: float) -> float:
        return mark


class DeviceClock:
    """On a GPU calls return early: a mark is an event in the stream, to be read when all is done.

    The first one is recorded while the stream is empty, so that the host's time of it is the device's.
    """

    def __init__(self, device: torch.device) -> None:
        torch.cuda.synchronize(device)
        self._first = self.mark()
        self.zero = time.perf_counter()

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, mark: torch.cuda.Event) -> float:
        return self.zero + self._first.elapsed_time(mark) / 1000


class Recorder(Watch):
    """Puts a range in the trace for each action, wait and phase, and keeps their times."""

    def __init__(self, clock: HostClock | DeviceClock) -> None:
        self._clock: Any = clock
        self._begun: Any = None  # when the action under way began, or its wait was over
        self._seen: Counter[Action] = Counter()
        self._part = 0
        self._marks: list[tuple[dict[str, Any], Any, Any]] = []

    @contextmanager
    def action(self, action: Action) -> Generator[None]:
        with record_function(str(action)):
            self._part = self._seen[action]
            self._seen[action] += 1
            self._begun = self._clock.mark()
            yield
            self._keep(action.kind.value, action, self._begun)

    @contextmanager
    def waiting(self, kind: Kind, stage: int, microbatch: int) -> Generator[None]:
        message = Action(kind, stage, microbatch)
        with record_function(f"{WAIT} {message}"):
            begun = self._clock.mark()
            yield
            self._begun = self._keep(WAIT, message, begun)

    @contextmanager
    def phase(self, name: str) -> Generator[None]:
        with record_function(name):
            begun = self._clock.mark()
            yield
            self._keep(name, None, begun)

    def _keep(self, kind: str, action: Action | None, begun: Any) -> Any:
        ended = self._clock.mark()
        where: dict[str, Any] = {}
        if action is not None:
            where = {"stage": action.stage, "microbatch": action.microbatch, "part": self._part}
        self._marks.append(({"kind": kind, **where}, begun, ended))
        return ended

    def spans(self) -> tuple[MeasuredSpan, ...]:
        """What was measured. The device must have done all of it."""
        seconds = self._clock.seconds
        return tuple(
            MeasuredSpan(**what, start=seconds(begun), end=seconds(ended))
            for what, begun, ended in self._marks
        )


@contextmanager
def measured(
    directory: Path | None, place: Place, device: torch.device, watch: Callable[[Watch], None]
) -> Generator[None]:
    """Around a step: trace it, and write what was measured to `directory`; None: only meet the other ranks.

    Args:
        watch: makes the step tell a `Watch` what it does.
    """
    if directory is None:
        _meet(device)
        yield
        return
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    trace = profile(activities=activities)
    with trace:
        _meet(device)
        clock = DeviceClock(device) if on_gpu else HostClock()
        recorder = Recorder(clock)
        watch(recorder)
        try:
            yield
        finally:
            watch(Watch())
        if on_gpu:
            torch.cuda.synchronize(device)
        spans = recorder.spans()
    path = trace_path(directory, place.rank)
    trace.export_chrome_trace(str(path))
    compress_if_large(path)
    RankSpans(rank=place.rank, machine=machine(), met=clock.zero, spans=spans).save(directory)


def _meet(device: torch.device) -> None:
    """Leave together with the other ranks, and with nothing left to do."""
    if device.type == "cuda":
        dist.barrier(device_ids=[device.index])
        torch.cuda.synchronize(device)
    else:
        dist.barrier()
