"""Where the workers of a run live: a launcher starts one process a rank, watches them, and explains what went wrong.

>>> from mpsdk.launch import get_launcher
>>> get_launcher("local", processes=2).world_size(stated_degree=8)
2
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

from mpsdk.errors import ConfigError, Problem
from mpsdk.launch.control import Control, PeerError
from mpsdk.launch.environment import (
    generation_from_environment,
    place_from_environment,
    run_directory_from_environment,
)
from mpsdk.launch.local import LocalLauncher
from mpsdk.launch.worker_main import guard

__all__ = [
    "Control",
    "Launcher",
    "LocalLauncher",
    "PeerError",
    "generation_from_environment",
    "get_launcher",
    "guard",
    "place_from_environment",
    "run_directory_from_environment",
]


@runtime_checkable
class Launcher(Protocol):
    """What runs the ranks of a job somewhere and returns when all have finished. See LocalLauncher."""

    def world_size(self, stated_degree: int) -> int:
        """How many ranks there will be, when the distribution's stated degrees multiply to `stated_degree`."""
        ...

    def run(
        self,
        job_path: str | os.PathLike[str],
        *,
        world_size: int,
        run_directory: str | os.PathLike[str],
        on_event: Callable[[dict[str, Any]], object] | None = None,
    ) -> None:
        """Raises WorkerError, with the root cause on top, when the run fails."""
        ...


LAUNCHERS: dict[str, Callable[..., Launcher]] = {"local": LocalLauncher}


def get_launcher(launcher: str | Launcher, **options: Any) -> Launcher:
    """The launcher of this name, made with `options`; a launcher object is returned as it is.

    Raises ConfigError for an unknown name or for options beside an object.
    """
    if not isinstance(launcher, str):
        if options:
            raise ConfigError(
                [Problem("launcher", options, "options go with a launcher's name, not with an object")]
            )
        return launcher
    if launcher not in LAUNCHERS:
        near = difflib.get_close_matches(launcher, LAUNCHERS, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ConfigError(
            [Problem("launcher", launcher, f"{hint}known launchers: {', '.join(sorted(LAUNCHERS))}")]
        )
    return LAUNCHERS[launcher](**options)
