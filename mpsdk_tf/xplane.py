"""What TensorFlow's profiler saw: which operation ran on which thread, from when to when.

The profiler writes XPlane, a protobuf of events on lines. TensorFlow ships the module that reads it but does not list it
as public (the readers of it are TensorBoard's plugins), so that module is imported here and nowhere else.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from tensorflow.tsl.profiler.protobuf import xplane_pb2  # see above

from mpsdk.errors import BackendError

_HOST = "/host:CPU"
_DEVICE = "/device:"
_OPERATION = re.compile(r"([^:]+):([A-Za-z_]\w*)")  # its name in the program, and its type
_BEGUN, _DONE = "ExecutorState::ProcessAsync::Start", "ExecutorState::ProcessAsync::Done"


class Event(NamedTuple):
    """Something on a thread of this process or in a stream of a device. Seconds since the profiler was started.

    `of`: the name of the operation that the executor begins or ends with this event, if it says one.
    """

    name: str
    line: str
    on_device: bool
    start: float
    end: float
    of: str | None


class Operation(NamedTuple):
    """One run of an operation of a program, from its begin until its result is there. `times`: how often it ran before."""

    name: str
    start: float
    end: float
    times: int


def read_events(directory: Path) -> list[Event]:
    """All that the profiler has left under `directory`. Raises BackendError when there is nothing."""
    files = list(directory.rglob("*.xplane.pb"))
    if len(files) != 1:
        raise BackendError(f"TensorFlow's profiler left {len(files)} files where one was due")
    space: Any = xplane_pb2.XSpace()  # pyright: ignore[reportAttributeAccessIssue]: made when it is imported
    space.ParseFromString(files[0].read_bytes())
    return [event for plane in space.planes for event in _events(plane)]


def _events(plane: Any) -> Iterable[Event]:
    on_device = plane.name.startswith(_DEVICE)
    if plane.name != _HOST and not on_device:
        return
    name_stats = {number for number, stat in plane.stat_metadata.items() if stat.name == "name"}
    for number, line in enumerate(plane.lines):
        label = f"{plane.name if on_device else number} {line.name.partition('/')[0]}"
        for event in line.events:
            start = line.timestamp_ns * 1e-9 + event.offset_ps * 1e-12
            of = None
            for stat in event.stats:
                if stat.metadata_id in name_stats:
                    of = stat.str_value or plane.stat_metadata[stat.ref_value].name
            name = plane.event_metadata[event.metadata_id].name
            yield Event(name, label, on_device, start, start + event.duration_ps * 1e-12, of)


def operation_of(event: Event) -> tuple[str, str] | None:
    """Name and type of the operation that `event` is a run of."""
    match = None if event.on_device else _OPERATION.fullmatch(event.name)
    return None if match is None else (match[1], match[2])


def operations(events: Iterable[Event]) -> list[Operation]:
    """Every run of an operation on the host, in the order in which they began.

    Operations that finish later than their call returns (collectives, calls of functions) have an event where they begin
    and another where they are done; the rest, one of their own name.
    """
    begun: dict[str, list[float]] = {}
    done: dict[str, list[float]] = {}
    ran: list[tuple[float, float, str]] = []
    for event in sorted(events, key=lambda event: event.start):
        if event.of is not None and event.name == _BEGUN:
            begun.setdefault(event.of, []).append(event.start)
        elif event.of is not None and event.name == _DONE:
            done.setdefault(event.of, []).append(event.start)
        elif (operation := operation_of(event)) is not None:
            ran.append((event.start, event.end, operation[0]))
    ran = [(start, end, name) for start, end, name in ran if name not in begun]
    for name, starts in begun.items():
        ran += [(start, end, name) for start, end in zip(starts, done.get(name, []), strict=False)]
    seen: Counter[str] = Counter()
    found: list[Operation] = []
    for start, end, name in sorted(ran):
        found.append(Operation(name, start, end, seen[name]))
        seen[name] += 1
    return found
