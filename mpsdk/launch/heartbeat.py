"""What each rank is doing at this moment: one small memory-mapped record a rank, written by it and read by its launcher.

A note costs about a microsecond, so that it can stand before every action of a schedule. By convention its
text is "step 12: forward 3", with the step first where there is one, and starts with one of `WAITING` after
that when the rank depends on another: a rank that waits is not the one that hangs.
"""

from __future__ import annotations

import mmap
import re
import struct
import time
from pathlib import Path
from typing import NamedTuple

# The counter stands at both ends: a reader that sees two different ones has read in the middle of a write.
_RECORD = struct.Struct("<Qd232sQ")
_STEP = re.compile(r"(step|evaluation) \d+: ")

STARTING = "starting"  # before a worker's first note of its own
FINISHED = "finished"
WAITING = ("wait", "receive", "send", "barrier", "all_", "all-", "reduce", "broadcast")


class Activity(NamedTuple):
    """The last note of a rank: its number, when it was made (seconds since the epoch), what it says."""

    number: int
    time: float
    text: str

    @property
    def waits(self) -> bool:
        """Whether the rank said that it depends on another one."""
        return _STEP.sub("", self.text, count=1).startswith(WAITING)


def activity_path(control_directory: Path, rank: int) -> Path:
    return control_directory / f"activity-{rank}"


class Heartbeat:
    """The writing end, held by the rank itself."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w+b") as file:
            file.truncate(_RECORD.size)
            self._map = mmap.mmap(file.fileno(), _RECORD.size)
        self._count = 0

    def note(self, activity: str) -> None:
        """Record what the rank is about to do; text beyond 232 bytes is cut."""
        self._count += 1
        _RECORD.pack_into(self._map, 0, self._count, time.time(), activity.encode(), self._count)

    def close(self) -> None:
        self._map.close()


def read_activity(path: Path) -> Activity | None:
    """The last note in `path`; None when there is none yet, or when the rank is writing one at this very moment."""
    for _ in range(3):
        try:
            record = path.read_bytes()
        except OSError:
            return None
        if len(record) != _RECORD.size:
            return None
        first, noted_at, text, last = _RECORD.unpack(record)
        if first == last and first > 0:
            return Activity(first, noted_at, text.rstrip(b"\0").decode(errors="ignore"))
    return None
