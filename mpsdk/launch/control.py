"""Agreement between the ranks of a run through small files: no collective, no framework, no port.

A file is published whole (written aside, then renamed) and waited for by polling. That is meant for decisions
(which checkpoint to resume from, is the data ready, are all shards written), not for every step.
"""

from __future__ import annotations

import builtins
import contextlib
import json
import os
import re
import time
import traceback
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from mpsdk import errors
from mpsdk.errors import ConfigError, Problem, WorkerError
from mpsdk.launch.heartbeat import activity_path, read_activity

_POLL_SECONDS = 0.01
_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*")


class PeerError(WorkerError):
    """This rank is well, and noticed that another one failed or did not come."""


def control_directory(run_directory: str | os.PathLike[str], generation: str) -> Path:
    """Where the ranks of one start of a run leave files for each other and for their launcher."""
    return Path(run_directory) / "control" / _checked(generation)


def request_stop(run_directory: str | os.PathLike[str], generation: str) -> None:
    """Ask a run, from outside its ranks, to stop after its present step; seen by `Control.stop_requested`."""
    directory = control_directory(run_directory, generation)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "stop").touch()


class Control:
    """One rank's side of the agreement.

    All ranks call the same methods with the same keys in the same order, each key once; those who want what
    was published under a key collect it before they begin the next one. By this rule a complete `collect`
    shows that everything before it has been read, and its files go. A Control belongs to one thread; a second
    thread has its own, with its own keys.

    Args:
        directory: the run directory, the same on all ranks.
        generation: the name of this start of the run; files of another one are neither read nor removed.
        timeout: seconds that a missing rank may show no sign of life before the waiting ranks give up.
        note: told what this rank waits for.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        generation: str,
        rank: int,
        world_size: int,
        timeout: float = 600.0,
        note: Callable[[str], None] = lambda activity: None,
    ) -> None:
        self._directory = control_directory(directory, generation)
        self._directory.mkdir(parents=True, exist_ok=True)
        self._rank = rank
        self._world_size = world_size
        self._timeout = timeout
        self._note = note
        self._begun: set[str] = set()
        self._on_disk: list[str] = []

    def publish(self, key: str, value: object) -> None:
        """Make this rank's value for `key`, anything that JSON can hold, known to all ranks.

        Raises ValueError when the key was used before or can't name a file, TypeError when the value is no
        JSON.
        """
        text = json.dumps(value)
        self._begin(key)
        self._write(key, text)

    def collect(self, key: str) -> list[Any]:
        """The values of all ranks for `key`, in rank order.

        Raises PeerError, naming the ranks that did not come, when they show no sign of life for `timeout`
        seconds.
        """
        if self._on_disk[-1:] != [key]:
            raise ValueError(
                f"collect {key!r} directly after publishing it; the last key was {self._on_disk[-1:]}"
            )
        values = self._wait(key, range(self._world_size))
        for past in self._on_disk[:-1]:
            for rank in range(self._world_size):
                self._path(past, rank).unlink(missing_ok=True)
        self._on_disk = [key]
        return values

    def decide(self, key: str, make: Callable[[], Any]) -> Any:
        """Rank 0's `make()`, anything that JSON can hold, on every rank.

        What `make` raises on rank 0 is raised on all ranks: the same class for mpsdk's errors and Python's
        own, otherwise a WorkerError that quotes it. Raises PeerError when rank 0 shows no sign of life for
        `timeout` seconds.
        """
        self._begin(key)
        if self._rank == 0:
            self._note(f"decide {key!r}")
            try:
                value = make()
                text = json.dumps({"value": value})
            except Exception as error:
                self._write(key, json.dumps({"error": _to_json(error)}))
                raise
            self._write(key, text)
            return value
        (answer,) = self._wait(key, [0])
        if "error" in answer:
            told = answer["error"]
            raise _from_json(told) from PeerError(f"rank 0 failed in {key!r}:\n{told['traceback']}")
        return answer["value"]

    def barrier(self, key: str) -> None:
        """Return when every rank has called this."""
        self.publish(key, None)
        self.collect(key)

    def _begin(self, key: str) -> None:
        if _checked(key) in self._begun:
            raise ValueError(
                f"key {key!r} was used before; a key is used once, so put the step into it: {key}-100"
            )
        self._begun.add(key)
        self._on_disk.append(key)

    def _write(self, key: str, text: str) -> None:
        path = self._path(key, self._rank)
        partial = path.with_name(f"{path.name}.partial")
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)

    @property
    def stop_requested(self) -> bool:
        """Whether someone outside called `request_stop`. Ranks may see it at different steps: agree before acting."""
        return (self._directory / "stop").exists()

    def _path(self, key: str, rank: int) -> Path:
        return self._directory / f"{_checked(key)}.rank-{rank}.json"

    def _wait(self, key: str, ranks: Collection[int]) -> list[Any]:
        found: dict[int, Any] = {}
        signs: list[int] = []
        told = False
        started = last_sign = time.monotonic()
        while True:
            for rank in ranks:
                if rank not in found:
                    with contextlib.suppress(FileNotFoundError):
                        found[rank] = json.loads(self._path(key, rank).read_text(encoding="utf-8"))
            missing = [rank for rank in ranks if rank not in found]
            if not missing:
                break
            if not told:
                self._note(f"wait for {key!r} from {_named(missing)}")
                told = True
            now = time.monotonic()
            if (seen := self._signs_of_life(missing)) != signs:
                signs, last_sign = seen, now
            if now - last_sign > self._timeout:
                raise PeerError(self._missing_text(key, missing, now - started))
            time.sleep(_POLL_SECONDS)
        if told:
            self._note(f"agreed on {key!r}")
        return [found[rank] for rank in ranks]

    def _signs_of_life(self, ranks: list[int]) -> list[int]:
        activities = (read_activity(activity_path(self._directory, rank)) for rank in ranks)
        return [activity.number if activity else 0 for activity in activities]

    def _missing_text(self, key: str, missing: list[int], waited: float) -> str:
        lines = [
            f"rank {self._rank} waited {waited:.1f} s for {key!r} from {_named(missing)}, "
            f"without a sign of life for {self._timeout:g} s"
        ]
        for rank in missing:
            activity = read_activity(activity_path(self._directory, rank))
            if activity:
                lines.append(f"  rank {rank}, {time.time() - activity.time:.1f} s ago: {activity.text}")
        return "\n".join(lines)


def _checked(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise ValueError(f"{name!r} can't be a file name here; use letters, digits, '-', '_' and '.'")
    return name


def _named(ranks: list[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def _to_json(error: Exception) -> dict[str, object]:
    told: dict[str, object] = {
        "type": type(error).__name__,
        "module": type(error).__module__,
        "message": str(error),
        "traceback": "".join(traceback.format_exception(error)),
    }
    if isinstance(error, ConfigError):
        told["problems"] = [(problem.field, repr(problem.got), problem.remedy) for problem in error.problems]
    return told


def _from_json(told: dict[str, Any]) -> Exception:
    """The error that rank 0 raised, rebuilt where its class is mpsdk's or Python's own and takes a message."""
    message: str = told["message"]
    if "problems" in told:
        error = ConfigError(Problem(*problem) for problem in told["problems"])
        error.args = (message,)
        return error
    kind: object = None
    if told["module"] in (errors.__name__, builtins.__name__):
        kind = vars(errors if told["module"] == errors.__name__ else builtins).get(told["type"])
    if isinstance(kind, type) and issubclass(kind, Exception):
        with contextlib.suppress(TypeError):
            rebuilt = kind(message)
            if str(rebuilt) == message:
                return rebuilt
    return WorkerError(f"rank 0 failed: {told['type']}: {message}")
