"""Which processes a launcher has left: those that inherited a mark from its environment."""

from __future__ import annotations

import time
from pathlib import Path

MARK = "MPSDK_TEST_MARK"


def marked(mark: str) -> list[str]:
    """The command lines of the living processes that were started with the mark in their environment (Linux)."""
    found: list[str] = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            environment = (process / "environ").read_bytes().split(b"\0")
            command = (process / "cmdline").read_bytes()
            state = (process / "stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue
        if f"{MARK}={mark}".encode() in environment and state != "Z":
            found.append(command.replace(b"\0", b" ").decode())
    return found


def wait_until_gone(mark: str, seconds: float = 5.0) -> list[str]:
    """What is still there after at most `seconds`."""
    deadline = time.monotonic() + seconds
    while (left := marked(mark)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return left
