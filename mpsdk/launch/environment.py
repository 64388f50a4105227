"""What a launcher tells a worker through environment variables: written for a rank, read back in its process.

`RANK`, `WORLD_SIZE` and `LOCAL_RANK` are torchrun's names, so that a worker started by torchrun reads the
same way.
"""

from __future__ import annotations

import os
import re
import secrets
import time
from collections.abc import Mapping
from pathlib import Path

from mpsdk.backend import Place
from mpsdk.errors import ConfigError, Problem

STORE = "MPSDK_STORE"
RUN_DIRECTORY = "MPSDK_RUN_DIRECTORY"
GENERATION = "MPSDK_GENERATION"
TIMEOUT = "MPSDK_TIMEOUT"
LAUNCHER = "MPSDK_LAUNCHER_PID"

DEFAULT_TIMEOUT = 600.0


def worker_environment(
    *,
    rank: int,
    world_size: int,
    run_directory: Path,
    generation: str,
    timeout: float,
    store: Path,
) -> dict[str, str]:
    """The variables that `place_from_environment` and its neighbours read back in the worker of `rank`."""
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(world_size),
        STORE: str(store),
        RUN_DIRECTORY: str(run_directory),
        GENERATION: generation,
        TIMEOUT: str(timeout),
        LAUNCHER: str(os.getpid()),
    }


def place_from_environment(environment: Mapping[str, str] = os.environ) -> Place | None:
    """Where this process stands among the ranks of a run; None when no launcher started it.

    Raises ConfigError, listing every problem, when the variables are there in part or don't fit together.
    """
    if "RANK" not in environment and "WORLD_SIZE" not in environment:
        return None
    problems: list[Problem] = []

    def whole_number(name: str, default: int | None = None) -> int:
        text = environment.get(name)
        if text is None and default is not None:
            return default
        if text is None or not re.fullmatch(r"\d+", text):
            problems.append(
                Problem(
                    name,
                    text,
                    "a launcher sets RANK and WORLD_SIZE together, to whole numbers; unset both otherwise",
                )
            )
            return 0
        return int(text)

    rank = whole_number("RANK")
    world_size = whole_number("WORLD_SIZE")
    local_rank = whole_number("LOCAL_RANK", default=0)
    if not problems and not rank < world_size:
        problems.append(Problem("RANK", rank, f"must be below WORLD_SIZE, which is {world_size}"))
    timeout = DEFAULT_TIMEOUT
    try:
        timeout = float(environment.get(TIMEOUT, DEFAULT_TIMEOUT))
    except ValueError:
        problems.append(Problem(TIMEOUT, environment[TIMEOUT], "must be a number of seconds"))
    if problems:
        raise ConfigError(problems, where="the environment of this process")
    return Place(rank, world_size, local_rank, store=environment.get(STORE), timeout=timeout)


def run_directory_from_environment(environment: Mapping[str, str] = os.environ) -> Path | None:
    """The directory that the launcher chose for logs, errors and control files; None when it chose none."""
    chosen = environment.get(RUN_DIRECTORY)
    return Path(chosen) if chosen else None


def new_generation() -> str:
    """A name for one start of a run, never used before: what separates it from earlier starts in the same directory."""
    return f"{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}-{secrets.token_hex(3)}"


def generation_from_environment(environment: Mapping[str, str] = os.environ) -> str:
    """The name of this start of the run, equal on all ranks and different from every earlier start.

    Under torchrun it is made of the run id and the restart count. On one machine the agent's process is part
    of it too, since torchrun's default id is "none" and an id may be used twice.
    """
    if GENERATION in environment:
        return environment[GENERATION]
    world_size = environment.get("WORLD_SIZE", "1")
    if world_size == "1":
        return new_generation()
    run_id = environment.get("TORCHELASTIC_RUN_ID")
    one_machine = environment.get("LOCAL_WORLD_SIZE") == world_size
    if run_id is None or (run_id == "none" and not one_machine):
        remedy = (
            "set it to one text on all ranks, new at every start"
            if run_id is None
            else "torchrun on several machines needs a --rdzv-id of its own for every run"
        )
        raise ConfigError([Problem(GENERATION, None, remedy)], where="the environment of this process")
    restart = environment.get("TORCHELASTIC_RESTART_COUNT", "0")
    agent = f"-{_identity(os.getppid())}" if one_machine else ""
    return re.sub(r"[^A-Za-z0-9_-]", "_", f"{run_id}-{restart}{agent}")


def _identity(pid: int) -> str:
    """A process id with its start time where Linux tells it, since ids are used again."""
    try:
        after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return str(pid)
    return f"{pid}-{after_name[19]}"
