"""The two shapes of a CheckpointError: a list of problems, and what the operating system said."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Sequence

from mpsdk.errors import CheckpointError


def refuse(heading: str, problems: Sequence[str], advice: str = "") -> CheckpointError:
    """An error with every problem on a numbered line, and what to do below them."""
    count = f"{len(problems)} problem{'s' if len(problems) != 1 else ''}"
    lines = [f"  {number}. {problem}" for number, problem in enumerate(problems, start=1)]
    return CheckpointError("\n".join([f"{heading}; {count}:", *lines, *([advice] if advice else [])]))


@contextlib.contextmanager
def os_errors(heading: str) -> Generator[None]:
    """Turn an OSError of the block into a CheckpointError."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{heading}: {error}") from error
