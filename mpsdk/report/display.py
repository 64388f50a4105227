"""How a run looks while it trains: one live line on a terminal, plain aligned lines everywhere else."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from rich.console import Console
    from rich.live import Live
    from rich.table import Table

Values = Mapping[str, Any]

_NARROWEST_BAR = 12


class Display(Protocol):
    """What a reporter drives; the events and rows are those of mpsdk.report.reporter."""

    def start(self, event: Values) -> None: ...
    def resume(self, event: Values) -> None: ...
    def log(self, row: Values) -> None: ...
    def evaluate(self, row: Values) -> None: ...
    def checkpoint(self, event: Values) -> None: ...
    def end(self, event: Values) -> None: ...
    def close(self) -> None: ...


class Progress:
    """What both displays show: the latest of everything, and how long the rest will take."""

    def __init__(self) -> None:
        self.step = 0
        self.steps = 0
        self.row: Values = {}
        self.validation: Values = {}
        self.checkpoint: Values = {}
        self.started = time.monotonic()
        self.first_step = 0
        self._pace: deque[tuple[float, int]] = deque(maxlen=20)

    def start(self, event: Values) -> None:
        self.started = time.monotonic()
        self.step = self.first_step = event["step"]
        self.steps = event["steps"]

    def log(self, row: Values) -> None:
        self.row = row
        self.step = row["step"]
        self._pace.append((time.monotonic(), self.step))

    def seconds_left(self) -> float | None:
        """By the pace of the last logged steps, evaluations and checkpoints included; None before there is one."""
        if not self._pace:
            return None
        since, first = self._pace[0]
        latest, last = self._pace[-1]
        seconds_per_step = (latest - since) / (last - first) if last > first else self.row.get("step_seconds")
        if seconds_per_step is None:
            return None
        return max(0.0, (self.steps - self.step) * seconds_per_step - (time.monotonic() - latest))

    def summary(self, reason: str | None) -> str:
        """One line on what was reached. `reason`: why it ended; None when it was cut off."""
        elapsed = duration(time.monotonic() - self.started)
        reached = f"{self.step - self.first_step:,} steps in {elapsed}"
        if self.first_step >= self.steps:
            reached = f"nothing to train: at step {self.first_step:,} already, of {self.steps:,}"
        elif self.step < self.steps:
            reached = f"{reason or 'cut off'} at step {self.step:,} of {self.steps:,} after {elapsed}"
        parts = [reached]
        if "loss" in self.row:
            parts.append(f"loss {self.row['loss']:.4f}")
        if self.validation:
            parts.append(f"validation {measures(self.validation)}")
        if self.checkpoint:
            parts.append(f"checkpoint {self.checkpoint['path']}")
        return ", ".join(parts)


def measures(row: Values) -> str:
    """Loss and metrics of an evaluation's row.

    >>> measures({"step": 3, "validation_loss": 0.5, "validation_accuracy": 0.75, "validation_f1_macro": 2 / 3})
    '0.5000, accuracy 0.7500, F1 macro 0.6667'
    """
    shown = {name.removeprefix("validation_"): value for name, value in row.items() if name != "step"}
    parts = [_number(shown.pop("loss"))]
    parts += [
        f"{name.replace('_', ' ').replace('f1', 'F1')} {_number(value)}" for name, value in shown.items()
    ]
    return ", ".join(parts)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}" if abs(value) < 100_000 else f"{value:.3e}"


def heading(event: Values) -> str:
    """What is about to be trained, from a start event."""
    ranks = event["world_size"]
    parts = [
        f"{quantity(event['parameters'])} parameters",
        f"{ranks} rank{'s' if ranks != 1 else ''}",
        f"{event['tokens_per_step']:,} tokens a step",
        f"plan {event['plan_hash'][:8]}",
    ]
    if event["step"]:
        parts.append(f"from step {event['step']:,}")
    return ", ".join(parts)


_COLUMNS: dict[str, tuple[str, int, Callable[[float], str]]] = {
    "loss": ("loss ", 8, lambda loss: f"{loss:.4f}"),
    "grad_norm": ("grad norm ", 8, lambda norm: f"{norm:.3f}"),
    "learning_rate": ("learning rate ", 8, lambda rate: f"{rate:.2e}"),
    "tokens_per_second": ("", 14, lambda rate: f"{quantity(rate)} tokens/s"),
    "peak_memory_bytes": ("peak ", 6, lambda count: f"{quantity(count)}B"),
}


class PlainDisplay:
    """One line an event, in columns, for files and pipes."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress = Progress()

    def start(self, event: Values) -> None:
        self._progress.start(event)
        self._print(heading(event))

    def resume(self, event: Values) -> None:
        self._print(f"resumed from {event['path']}")

    def log(self, row: Values) -> None:
        self._progress.log(row)
        columns = [self._step(row["step"])]
        columns += [
            f"{label}{text(row[name]) if row[name] is not None else '-':>{width}}"
            for name, (label, width, text) in _COLUMNS.items()
            if name in row
        ]
        left = self._progress.seconds_left()
        if left is not None:
            columns.append(f"{duration(left):>7} left")
        self._print("  ".join(columns))

    def evaluate(self, row: Values) -> None:
        self._progress.validation = row
        self._print(f"{self._step(row['step'])}  validation loss {measures(row)}")

    def checkpoint(self, event: Values) -> None:
        self._progress.checkpoint = event
        self._print(f"{self._step(event['step'])}  checkpoint {event['path']}")

    def end(self, event: Values) -> None:
        self._progress.step = event["step"]
        self._print(self._progress.summary(event["reason"]))

    def close(self) -> None:
        pass

    def _step(self, step: int) -> str:
        steps = f"{self._progress.steps:,}"
        return f"step {step:>{len(steps)},}/{steps}"

    def _print(self, line: str) -> None:
        self._console.print(line, soft_wrap=True, markup=False, highlight=False, emoji=False)


class TerminalDisplay:
    """A line that is redrawn at the bottom; what stays above it: the heading, evaluations, the summary."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress = Progress()
        self._live: Live | None = None  # made at the start, because it draws its first line when it is made

    def start(self, event: Values) -> None:
        from rich.live import Live

        self._progress.start(event)
        self._print(heading(event))
        self._live = Live(
            console=self._console, get_renderable=self._line, refresh_per_second=4, transient=True
        )
        self._live.start()

    def resume(self, event: Values) -> None:
        self._print(f"resumed from {event['path']}")

    def log(self, row: Values) -> None:
        self._progress.log(row)

    def evaluate(self, row: Values) -> None:
        self._progress.validation = row
        width = len(f"{self._progress.steps:,}")
        loss = f"loss {self._progress.row['loss']:.4f}   " if self._progress.row else ""
        self._print(f"  step {row['step']:>{width},}   {loss}validation {measures(row)}")

    def checkpoint(self, event: Values) -> None:
        self._progress.checkpoint = event

    def end(self, event: Values) -> None:
        self._progress.step = event["step"]
        self._leave(event["reason"])

    def close(self) -> None:
        if self._live and self._live.is_started:
            self._leave(None)

    def _leave(self, reason: str | None) -> None:
        if self._live:
            self._live.stop()
        self._print(self._progress.summary(reason))

    def _print(self, line: str) -> None:
        self._console.print(line, markup=False, highlight=False, emoji=False)

    def _line(self) -> Table:
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        progress = self._progress
        steps = f"{progress.steps:,}"
        count = f"{progress.step:>{len(steps)},}/{steps}"
        left = progress.seconds_left()
        # From what a person misses most to what a narrow terminal can do without.
        fields = [
            ("count", Text(count)),
            ("left", Text(f"{duration(left)} left" if left is not None else "", "dim")),
        ]
        if progress.row:
            fields.append(("loss", Text.assemble("loss ", (f"{progress.row['loss']:.4f}", "bold"))))
        if progress.validation:
            loss = _number(progress.validation["validation_loss"])
            fields.append(("validation", Text(f"validation {loss}")))
        if progress.row:
            speed = f"{quantity(progress.row['tokens_per_second']):>5} tokens/s"
            fields.append(("speed", Text(speed, "dim")))
        room = self._console.width - _NARROWEST_BAR
        shown: dict[str, Text] = {}
        for name, text in fields:
            room -= text.cell_len + 3
            if room < 0:
                break
            shown[name] = text
        line = Table.grid(padding=(0, 3, 0, 0), expand=True)
        line.add_column(ratio=1)
        order = [name for name in ("count", "loss", "validation", "speed", "left") if name in shown]
        for _ in order:
            line.add_column(no_wrap=True)
        bar = ProgressBar(
            total=max(1, progress.steps),
            completed=progress.step,
            complete_style="cyan",
            finished_style="cyan",
        )
        line.add_row(bar, *(shown[name] for name in order))
        return line


def quantity(number: float) -> str:
    """Three figures and a letter.

    >>> quantity(836352), quantity(48123.4), quantity(12)
    ('836k', '48.1k', '12')
    """
    for letter in ("", "k", "M", "G", "T", "P"):
        if abs(number) < 999.5:
            return f"{number:.3g}{letter}"
        number /= 1000
    return f"{number:,.0f}E"


def duration(seconds: float) -> str:
    """Hours, minutes and seconds, as a clock says them.

    >>> duration(42), duration(3725)
    ('0:42', '1:02:05')
    """
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
