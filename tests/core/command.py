"""What tests of the command line share: a small job file, and what a command prints."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from tests.core.jobs import MODEL, TRAINING


class Outcome(NamedTuple):
    code: int
    out: str
    err: str


Mpsdk = Callable[..., Outcome]


def job_in(directory: Path, **changes: Any) -> Path:
    content = {
        "model": MODEL,
        "training": TRAINING,
        "data": {"train": str(directory / "text.txt"), "validation": 0.2},
        "output_dir": str(directory / "run"),
        **changes,
    }
    path = directory / "job.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path
