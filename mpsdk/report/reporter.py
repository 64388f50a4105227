"""What happens with a run's events: shown to the person, written for TensorBoard, handed to callbacks.

An event is one JSON object with the field "event":

    start {step, steps, parameters, world_size, plan_hash, tokens_per_step}    log {a row of the history}
    evaluate {step, and what mpsdk.metrics.measured gives}    checkpoint {step, path}    resume {step, path}
    end {step, reason}
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mpsdk.metrics import validation_row
from mpsdk.report.callbacks import Callback
from mpsdk.report.display import Display, PlainDisplay, TerminalDisplay
from mpsdk.report.event_file import EventFile
from mpsdk.report.history import only_finite

if TYPE_CHECKING:
    from rich.console import Console

_log = logging.getLogger(__name__)

_NOT_A_CURVE = ("step", "tokens")


class Reporter:
    """Follows one run, from the events that `handle` is given in their order.

    Args:
        output_dir: TensorBoard's event files go to `tensorboard` in it, when that package is installed.
        callbacks: told of everything after it is shown.
        console: where to show it; by default the standard output.
    """

    def __init__(
        self,
        output_dir: str | os.PathLike[str],
        callbacks: Sequence[Callback] = (),
        console: Console | None = None,
    ) -> None:
        from rich.console import Console

        self._callbacks = tuple(callbacks)
        console = console or Console()
        self._display: Display = (
            TerminalDisplay(console)
            if console.is_terminal and not console.is_dumb_terminal
            else PlainDisplay(console)
        )
        self._directory = Path(output_dir) / "tensorboard"
        self._curves: EventFile | None = None
        self._handlers = {
            "start": self._start,
            "log": self._log_row,
            "evaluate": self._evaluate,
            "checkpoint": self._checkpoint,
            "resume": self._resume,
            "end": self._end,
        }

    def handle(self, event: Mapping[str, Any]) -> Literal["stop"] | None:
        """Show, write and pass on one event; "stop" when a callback asked for that."""
        content = {name: value for name, value in event.items() if name != "event"}
        handler = self._handlers.get(event["event"])
        if handler is None:
            _log.warning("an event of a kind that this version doesn't know, left out: %r", event)
            return None
        return "stop" if "stop" in handler(content) else None

    def close(self) -> None:
        """Leave the terminal as it was. Safe to call twice."""
        self._display.close()
        if self._curves:
            self._curves.close()

    def _start(self, event: dict[str, Any]) -> Sequence[object]:
        self._display.start(event)
        self._curves = self._curves or _event_file(self._directory)
        if self._curves and event["step"]:
            self._curves.restart(event["step"])
        return [callback.on_start(event) for callback in self._callbacks]

    def _resume(self, event: dict[str, Any]) -> Sequence[object]:
        self._display.resume(event)
        return ()

    def _log_row(self, row: dict[str, Any]) -> Sequence[object]:
        self._display.log(row)
        self._plot(row)
        return [callback.on_log(row) for callback in self._callbacks]

    def _evaluate(self, event: dict[str, Any]) -> Sequence[object]:
        measures = {name: value for name, value in event.items() if name != "step"}
        row = only_finite({"step": event["step"], **validation_row(measures)})
        self._display.evaluate(row)
        self._plot(row)
        return [callback.on_evaluate(row) for callback in self._callbacks]

    def _checkpoint(self, event: dict[str, Any]) -> Sequence[object]:
        self._display.checkpoint(event)
        return [callback.on_checkpoint(event) for callback in self._callbacks]

    def _end(self, event: dict[str, Any]) -> Sequence[object]:
        self._display.end(event)
        return [callback.on_end(event) for callback in self._callbacks]

    def _plot(self, row: Mapping[str, Any]) -> None:
        if self._curves:
            curves = {
                name: value for name, value in row.items() if name not in _NOT_A_CURVE and value is not None
            }
            self._curves.scalars(row["step"], curves)


def _event_file(directory: Path) -> EventFile | None:
    try:
        return EventFile(directory)
    except ImportError as error:
        _log.info("no curves for TensorBoard: %s", error)
        return None
