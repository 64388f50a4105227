"""The one shape of a CheckpointError that lists problems."""

from __future__ import annotations

from collections.abc import Sequence

from mpsdk.errors import CheckpointError


def refuse(heading: str, problems: Sequence[str], advice: str = "") -> CheckpointError:
    """An error with every problem on a numbered line, and what to do below them."""
    count = f"{len(problems)} problem{'s' if len(problems) != 1 else ''}"
    lines = [f"  {number}. {problem}" for number, problem in enumerate(problems, start=1)]
    return CheckpointError("\n".join([f"{heading}; {count}:", *lines, *([advice] if advice else [])]))
