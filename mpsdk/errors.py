"""Every error that mpsdk raises on purpose, and the one shape of a configuration problem.

An error is written for the person who reads it at night: which field, what it got, what would do.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


class MpsdkError(Exception):
    """Base of all errors that mpsdk raises on purpose."""


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a configuration.

    `field` is the dotted path that the user wrote (`pipeline.degree`), `got` the value found there,
    `remedy` one sentence that says what is wrong and which values would do.
    """

    field: str
    got: object
    remedy: str

    def __str__(self) -> str:
        return f"{self.field} (got {self.got!r}): {self.remedy}"


class ConfigError(MpsdkError, ValueError):
    """A configuration that cannot work. Lists every problem found, not only the first."""

    def __init__(self, problems: Iterable[Problem], *, where: str = "the configuration") -> None:
        self.problems = tuple(problems)
        count = len(self.problems)
        heading = f"{count} problem{'s' if count != 1 else ''} in {where}:"
        lines = [f"  {number}. {problem}" for number, problem in enumerate(self.problems, start=1)]
        super().__init__("\n".join([heading, *lines]))


class DataError(MpsdkError, ValueError):
    """Training or validation data that cannot be used, with the file and what to do."""


class CheckpointError(MpsdkError, RuntimeError):
    """A checkpoint that is missing, incomplete, damaged, or does not fit the model."""


class ScheduleError(MpsdkError, ValueError):
    """A pipeline schedule that is incomplete or would deadlock; names the rank and the action."""


class WorkerError(MpsdkError, RuntimeError):
    """A worker failed, was killed or hung. The root cause and its rank come first."""


class BackendError(MpsdkError, RuntimeError):
    """A framework backend is not installed or cannot do what the plan asks for."""
