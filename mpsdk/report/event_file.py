"""Scalars in TensorBoard's event file format, written without TensorFlow.

`tensorboard.summary.writer` would do the same, but imports TensorFlow where it is installed, which costs seconds.
"""

from __future__ import annotations

import itertools
import os
import socket
import struct
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_serial = itertools.count()


class EventFile:
    """One file of events in `directory`. Raises ImportError when the tensorboard package is not installed."""

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        from tensorboard.compat.proto import event_pb2, summary_pb2  # pyright: ignore
        from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c  # pyright: ignore

        self._events: Any = event_pb2
        self._summaries: Any = summary_pb2
        self._checksum: Any = masked_crc32c
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{os.getpid()}.{next(_serial)}"
        self._file = (directory / name).open("ab")
        self._write(file_version="brain.Event:2")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Add one point to the curve of each name."""
        points = [self._summaries.Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
        self._write(step=step, summary=self._summaries.Summary(value=points))

    def restart(self, step: int) -> None:
        """Training goes on from `step`: TensorBoard drops the points of earlier files after it."""
        status = self._events.SessionLog(status=self._events.SessionLog.START)
        self._write(step=step + 1, session_log=status)

    def close(self) -> None:
        self._file.close()

    def _write(self, **fields: object) -> None:
        """One record: length, its checksum, data, its checksum (tensorflow/core/lib/io/record_writer.h)."""
        data: bytes = self._events.Event(wall_time=time.time(), **fields).SerializeToString()
        length = struct.pack("<Q", len(data))
        self._file.write(
            length
            + struct.pack("<I", self._checksum(length))
            + data
            + struct.pack("<I", self._checksum(data))
        )
        self._file.flush()
