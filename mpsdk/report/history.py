"""The history of a run: one JSON object a line in `history.jsonl`, appended as training goes.

A row of training has `step, loss, learning_rate, grad_norm, tokens, tokens_per_second, step_seconds, peak_memory_bytes`,
a row of an evaluation `step, validation_loss` and the objective's metrics: `validation_perplexity`, or `validation_accuracy`,
`validation_f1_macro` and, with two classes, `validation_f1` (see `mpsdk.metrics`). A number that is not finite, such as the
gradient norm of a step that fp16's loss scaling skipped, is null in the file and None here: JSON has no infinity.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_log = logging.getLogger(__name__)

Row = dict[str, Any]


class History:
    """The writing end. A last line that a crash has cut short is removed when the file is opened.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "history.jsonl"
    >>> history = History(path)
    >>> history.append({"step": 10, "loss": 3.2})
    >>> history.append({"step": 20, "loss": 3.0})
    >>> history.truncate(10)
    >>> History.load(path)
    [{'step': 10, 'loss': 3.2}]
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = Path(path)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        if self._path.exists():
            with self._path.open("r+b") as file:
                file.truncate(len(_whole_lines(file.read())))

    def append(self, row: Mapping[str, Any]) -> None:
        """Write one row; it is in the file when this returns."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(_line(row))

    def truncate(self, step: int) -> None:
        """Remove the rows after `step`: a run that resumes there makes them again."""
        kept = [row for row in self.load(self._path) if row["step"] <= step]
        partial = self._path.with_name(f"{self._path.name}.partial")
        partial.write_text("".join(_line(row) for row in kept), encoding="utf-8")
        os.replace(partial, self._path)

    @staticmethod
    def load(path: str | os.PathLike[str]) -> list[Row]:
        """All rows in `path`, none when there is no such file. A damaged line is left out with a warning."""
        try:
            content = Path(path).read_bytes()
        except FileNotFoundError:
            return []
        rows: list[Row] = []
        for number, line in enumerate(_whole_lines(content).splitlines(), start=1):
            try:
                row = json.loads(line)
                rows.append({**row, "step": int(row["step"])})
            except (ValueError, TypeError, KeyError):
                _log.warning("%s, line %d: no row of a history, left out", path, number)
        return rows


def only_finite(row: Mapping[str, Any]) -> Row:
    """`row` with None for every number that is not finite."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in row.items()
    }


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(only_finite(row), allow_nan=False) + "\n"


def _whole_lines(content: bytes) -> bytes:
    """What is left of a file without a last line that lacks its end."""
    return content[: content.rfind(b"\n") + 1]
