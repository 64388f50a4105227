"""What a user's own code is told while a run trains."""

from __future__ import annotations

from typing import Any

Event = dict[str, Any]
Row = dict[str, Any]


class Callback:
    """Base class: override what is of interest. Callbacks run where `fit` was called, never inside a training step.

    >>> class StopWhenGood(Callback):
    ...     def on_log(self, row):
    ...         return "stop" if row["loss"] < 2.0 else None
    """

    def on_start(self, event: Event) -> None:
        """Training begins: `step` (0, or where it resumes), `steps`, `parameters`, `world_size`, `plan_hash`,
        `tokens_per_step`."""

    def on_log(self, row: Row) -> str | None:
        """A step was logged: the row of `run.history`. Returning "stop" asks for a stop at the next chance.

        A number of the row that is not finite is None: `grad_norm`, where fp16's loss scaling skipped the step.
        """

    def on_evaluate(self, row: Row) -> str | None:
        """An evaluation is done: its row of `run.history`. Returning "stop" asks for a stop at the next chance."""

    def on_checkpoint(self, event: Event) -> None:
        """A checkpoint is complete: `step`, `path`."""

    def on_end(self, event: Event) -> None:
        """Training is over: `step`, `reason`."""
