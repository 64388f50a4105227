"""Small worker programs for the launcher's tests: plain Python under `guard`, so that a run takes a second."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]

_PROGRAM = """\
import os, signal, sys, time
sys.path.insert(0, {root!r})
from mpsdk.launch import guard

def main(place):
    rank, note = place.rank, place.note
{body}

guard(main)
"""


def worker_command(directory: Path, body: str) -> Sequence[str]:
    """The command of a worker whose `main(place)` is `body`, which may use `place`, `rank` and `note`."""
    script = directory / "worker.py"
    script.write_text(_PROGRAM.format(root=str(ROOT), body=textwrap.indent(textwrap.dedent(body), "    ")))
    return [sys.executable, str(script)]
