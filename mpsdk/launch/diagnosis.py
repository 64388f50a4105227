"""Why a run failed: what each rank left behind, which of them is the root cause, and the text that says so.

Pure functions over plain data, but for the error file of a rank, which is written and read here.
"""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from mpsdk.launch.control import PeerError
from mpsdk.launch.heartbeat import FINISHED, STARTING, Activity

# What gloo, NCCL, gRPC and sockets say on a rank that is well itself and has lost another one.
_LOST_PEER = re.compile(
    r"connection (was )?(closed|reset|refused|aborted)|connectFullMesh failed|broken pipe|socket closed"
    r"|peer\b.*\b(closed|died|gone)|timed out (after )?waiting|wait timeout|deadline ?exceeded|collective ops is aborted"
    r"|remote (process|peer) (exited|failed)|watchdog caught collective|collective operation timeout|heartbeat timeout",
    re.IGNORECASE,
)
_LOST_PEER_TYPES = (
    "UnavailableError",
    "DeadlineExceededError",
    "DistNetworkError",
)

# Where a rank's innermost Python frame lies while it waits for another one inside a framework.
_COMMUNICATION = re.compile(r"torch/distributed/|mpsdk_(torch|tf)/comm\.py|tensorflow/python/distribute/")

_LOG_LINES = 30
_STACK_LINES = 25


@dataclass(frozen=True)
class Failure:
    """The error that ended a rank, in its own words: the content of `errors/rank-N.json`."""

    rank: int
    generation: str
    time: float  # seconds since the epoch
    type: str
    message: str
    traceback: str
    activity: str
    consequence: bool  # the rank was well and lost another one


@dataclass(frozen=True)
class Observation:
    """What the launcher knew of a rank at the moment when it gave the run up."""

    rank: int
    exit_code: int | None  # None: still running; negative: ended by that signal
    ended_at: float | None  # seconds since the epoch
    failure: Failure | None
    activity: Activity | None
    silent: float  # seconds without a new note
    log: Path
    log_tail: str = ""  # what the rank wrote last, of this start only
    stack: str = ""  # its Python stack, where it was asked for

    @property
    def failed(self) -> bool:
        return self.failure is not None or self.exit_code not in (None, 0)

    @property
    def left_early(self) -> bool:
        """Gone with exit code 0 although it had work left, as after os._exit(0)."""
        return self.exit_code == 0 and self.activity is not None and self.activity.text != FINISHED

    @property
    def has_begun(self) -> bool:
        """Whether it has noted anything after the note that `guard` makes."""
        return self.activity is not None and self.activity.text != STARTING

    @property
    def waits(self) -> bool:
        """Whether it waits for another rank: by its own word, or by where its stack ends."""
        if self.activity is not None and self.activity.waits:
            return True
        return bool(_COMMUNICATION.search(next(iter(self.stack.splitlines()), "")))

    @property
    def doing(self) -> str:
        return self.activity.text if self.activity else "not in Python yet"


def is_consequence(error: BaseException) -> bool:
    """Whether `error` only says that another rank is gone or silent."""
    chain = (error, error.__cause__)
    if any(isinstance(link, (PeerError, ConnectionError)) for link in chain):
        return True
    names = {cls.__name__ for cls in type(error).__mro__}
    return not names.isdisjoint(_LOST_PEER_TYPES) or bool(_LOST_PEER.search(str(error)))


def error_path(run_directory: Path, rank: int) -> Path:
    return run_directory / "errors" / f"rank-{rank}.json"


def write_failure(run_directory: Path, failure: Failure) -> None:
    path = error_path(run_directory, failure.rank)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(asdict(failure), indent=1), encoding="utf-8")
    os.replace(partial, path)


def read_failure(run_directory: Path, rank: int, generation: str) -> Failure | None:
    """The error of `rank` in this start of the run; None when it left none."""
    try:
        failure = Failure(**json.loads(error_path(run_directory, rank).read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    return failure if failure.generation == generation else None


def root_cause(observations: Sequence[Observation]) -> Observation | None:
    """The rank that failed first among those with the strongest kind of failure.

    A rank's own error, or a signal, comes before an exit without a word (or SIGABRT, by which communication
    libraries end a process that lost a peer), and that before an error which only says that a peer is gone.
    """
    failed = [seen for seen in observations if seen.failed]
    return min(failed, key=lambda seen: (_strength(seen), _time_of(seen)), default=None)


def is_certain(seen: Observation) -> bool:
    """Whether a failure explains itself, so that no stronger one need be waited for."""
    return _strength(seen) == 0


def _strength(seen: Observation) -> int:
    if seen.failure:
        return 2 if seen.failure.consequence else 0
    code = seen.exit_code or 0
    return 0 if code < 0 and -code != signal.SIGABRT else 1


def _time_of(seen: Observation) -> float:
    return seen.failure.time if seen.failure else seen.ended_at or 0.0


def likely_hung(observations: Sequence[Observation], overdue: Sequence[int]) -> Observation:
    """The rank that holds the others up: it runs and doesn't wait for another. Of several, one of the `overdue` ranks, and
    the one that has been silent for longest."""
    running = [seen for seen in observations if seen.exit_code is None]
    return max(running, key=lambda seen: (not seen.waits, seen.rank in overdue, seen.silent))


def failure_text(culprit: Observation, observations: Sequence[Observation]) -> str:
    """The report of a run in which `culprit` failed: its own traceback on top, then what every rank was doing."""
    who = f"rank {culprit.rank} of {len(observations)}"
    parts: list[str] = []
    if culprit.failure:
        parts += _suspicion(culprit.failure, observations)
        parts.append(f"{who} failed with {culprit.failure.type}: {culprit.failure.message}")
        parts += [f"while: {culprit.failure.activity}\n", culprit.failure.traceback.rstrip()]
    else:
        parts.append(f"{who} {_ending(culprit)}, while: {culprit.doing}")
        if culprit.exit_code == -signal.SIGKILL:
            parts.append(
                "SIGKILL comes from outside: the kernel when memory ran out (see dmesg), a job manager, or a person."
            )
        parts.append(_quoted_log(culprit))
    return "\n".join([*parts, *_every_rank(observations, apart_from=culprit), _where(observations)])


def _suspicion(failure: Failure, observations: Sequence[Observation]) -> list[str]:
    """Who is to blame when `failure` only says that some rank is gone or silent: one that runs and doesn't wait."""
    suspects = [
        seen for seen in observations if seen.exit_code is None and not seen.failed and not seen.waits
    ]
    if not failure.consequence or not suspects:
        return []
    suspect = likely_hung(suspects, overdue=())
    return [
        f"rank {suspect.rank} of {len(observations)} seems to hang: nothing new for {suspect.silent:.1f} s, "
        f"while: {suspect.doing}\nrank {failure.rank} gave up on it:\n"
    ]


def hang_text(hung: Observation, observations: Sequence[Observation], timeout: float) -> str:
    """The report of a run in which no rank failed and `hung` stopped making progress."""
    return "\n".join(
        [
            f"rank {hung.rank} of {len(observations)} hung: nothing new for {hung.silent:.1f} s "
            f"(timeout {timeout:g} s), while: {hung.doing}",
            *_stack_of(hung),
            *_every_rank(observations, apart_from=hung),
            _where(observations),
            "If the work is sound and only slow, give the launcher a longer timeout: LocalLauncher(timeout=...).",
        ]
    )


def departed_text(gone: Observation, observations: Sequence[Observation], waited: float) -> str:
    """The report of a run in which `gone` ended without an error and the others did not follow."""
    why = (
        "before its work was done"
        if gone.left_early
        else f"and {waited:.0f} s later others were still running"
    )
    return "\n".join(
        [
            f"rank {gone.rank} of {len(observations)} left with exit code 0 {why}; its last note: {gone.doing}",
            _quoted_log(gone),
            *_every_rank(observations, apart_from=gone),
            _where(observations),
        ]
    )


def _ending(seen: Observation) -> str:
    code = seen.exit_code or 0
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        return f"was killed by {signal.Signals(-code).name} (signal {-code})"
    except ValueError:
        return f"was killed by signal {-code}"


def _every_rank(observations: Sequence[Observation], *, apart_from: Observation) -> list[str]:
    lines = ["", "all ranks when the run was given up:"]
    states = [_state(seen) for seen in observations]
    width = max(len(state) for state in states)
    lines += [
        f"  rank {seen.rank}  {state:<{width}}  {seen.doing}"
        for seen, state in zip(observations, states, strict=True)
    ]
    for seen in observations:
        if seen.rank != apart_from.rank and seen.stack:
            lines += ["", f"rank {seen.rank}:", *_stack_of(seen)]
    return lines


def _state(seen: Observation) -> str:
    if seen.failure:
        return f"failed with {seen.failure.type}"
    if seen.exit_code is None:
        return f"running, silent for {seen.silent:.1f} s"
    return _ending(seen)


def _stack_of(seen: Observation) -> list[str]:
    if not seen.stack:
        return ["it gave no Python stack: it is stopped (SIGSTOP), or holds its signals back"]
    return ["its Python stack, most recent call first:", *seen.stack.splitlines()[:_STACK_LINES]]


def _quoted_log(seen: Observation) -> str:
    """The end of a rank's log, from the last traceback on if there is one."""
    lines = seen.log_tail.rstrip().splitlines()
    starts = [number for number, line in enumerate(lines) if line.startswith("Traceback (most recent")]
    lines = lines[starts[-1] :] if starts else lines
    if not lines:
        return "(its log is empty)"
    return "\n".join(["the end of its log:", *(f"  {line}" for line in lines[-_LOG_LINES:])])


def _where(observations: Sequence[Observation]) -> str:
    return f"\nlogs: {observations[0].log.parent}"
