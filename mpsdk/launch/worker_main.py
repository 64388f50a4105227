"""The outermost frame of a worker process: it dies with its launcher, notes what it does, and leaves its error behind."""

from __future__ import annotations

import ctypes
import faulthandler
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from mpsdk.backend import Place
from mpsdk.launch.control import control_directory
from mpsdk.launch.diagnosis import Failure, is_consequence, write_failure
from mpsdk.launch.environment import (
    LAUNCHER,
    generation_from_environment,
    place_from_environment,
    run_directory_from_environment,
)
from mpsdk.launch.heartbeat import FINISHED, STARTING, Heartbeat, activity_path, read_activity

_PR_SET_PDEATHSIG = 1


def guard(main: Callable[[Place], object]) -> None:
    """Run `main(place)`, the work of this process, and leave what a launcher needs to explain a failure.

    `place.note` writes the heartbeat. An exception goes to `errors/rank-N.json` of the run directory and on
    to the caller, so that Python prints it to the rank's log and ends with exit code 1. Without a launcher
    `main` gets rank 0 of 1.
    """
    die_with_launcher()
    place = place_from_environment() or Place(rank=0, world_size=1)
    run_directory = run_directory_from_environment()
    if run_directory is None:
        main(place)
        return
    generation = generation_from_environment()
    # On SIGUSR1 a rank prints its Python stack even while it hangs in C code; on SIGSEGV and its like, before
    # it dies.
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    faulthandler.enable()
    heartbeat = Heartbeat(activity_path(control_directory(run_directory, generation), place.rank))
    heartbeat.note(STARTING)
    try:
        main(replace(place, note=heartbeat.note))
    except SystemExit as leaving:
        if leaving.code in (None, 0):
            heartbeat.note(FINISHED)
        raise
    except BaseException as error:
        _leave(error, run_directory, generation, place.rank)
        raise
    heartbeat.note(FINISHED)


def _leave(error: BaseException, run_directory: Path, generation: str, rank: int) -> None:
    activity = read_activity(activity_path(control_directory(run_directory, generation), rank))
    own_frames = error.__traceback__.tb_next if error.__traceback__ else None  # without the frame of `guard`
    failure = Failure(
        rank=rank,
        generation=generation,
        time=time.time(),
        type=type(error).__name__,
        message=str(error),
        traceback="".join(traceback.format_exception(type(error), error, own_frames)),
        activity=activity.text if activity else "",
        consequence=is_consequence(error),
    )
    write_failure(run_directory, failure)


def die_with_launcher() -> None:
    """Have the kernel kill this process when the launcher's thread that started it ends (Linux), however it ends."""
    launcher = os.environ.get(LAUNCHER)
    if launcher is None or not sys.platform.startswith("linux"):
        return
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(launcher):  # it ended before the call
        os.kill(os.getpid(), signal.SIGKILL)
