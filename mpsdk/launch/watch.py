"""Whether a run has to be given up: looks at its processes, error files and heartbeats, and says why."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from mpsdk.launch import diagnosis
from mpsdk.launch.control import control_directory
from mpsdk.launch.diagnosis import Observation
from mpsdk.launch.heartbeat import Activity, activity_path, read_activity
from mpsdk.launch.processes import Group, Worker

_SETTLE_SECONDS = 1.0  # after a failure that may be a consequence: time for its cause to show itself
_START_SECONDS = 120.0  # at least, for a rank to import its framework and note something of its own
_DEPARTURE_SECONDS = 10.0  # for the others to leave too, after a rank that left with work undone


class Watch:
    """The judgement over one run.

    A rank is hung when it has noted nothing new for `timeout` seconds, unless it says that it waits for
    another and some other rank still moves. Until its first note of its own, while it imports a framework, it
    has longer. Programs that write no heartbeat at all are not judged by silence.
    """

    def __init__(self, group: Group, run_directory: Path, generation: str, timeout: float) -> None:
        self._group = group
        self._run_directory = run_directory
        self._control = control_directory(run_directory, generation)
        self._generation = generation
        self._timeout = timeout
        self._last: dict[int, Activity | None] = {}
        self._changed = {worker.rank: worker.started for worker in group.workers}

    def reason_to_end(self) -> str | None:
        """The report of what went wrong; None while nothing has."""
        ranks = self._observe()
        if any(seen.failed for seen in ranks):
            return self._failure()
        running = [seen for seen in ranks if seen.exit_code is None]
        if running and (gone := self._departed(ranks)):
            waited = time.time() - (gone.ended_at or 0.0)
            return diagnosis.departed_text(self._with_log(gone), self._with_stacks(ranks), waited)
        if overdue := self._hung(running):
            ranks = self._with_stacks(ranks)
            hung = diagnosis.likely_hung(ranks, [seen.rank for seen in overdue])
            return diagnosis.hang_text(hung, ranks, self._patience(hung))
        return None

    def _failure(self) -> str:
        deadline = time.monotonic() + _SETTLE_SECONDS
        while True:
            ranks = self._observe()
            culprit = diagnosis.root_cause(ranks)
            assert culprit is not None
            if diagnosis.is_certain(culprit):
                break
            if all(seen.failed for seen in ranks) or time.monotonic() > deadline:
                ranks = self._with_stacks(ranks)
                break
            time.sleep(0.05)
        return diagnosis.failure_text(self._with_log(culprit), ranks)

    def _departed(self, ranks: Sequence[Observation]) -> Observation | None:
        """A rank that left with exit code 0 and whose peers had their time to follow it."""
        for seen in ranks:
            if seen.exit_code == 0 and seen.ended_at is not None:
                patience = min(_DEPARTURE_SECONDS, self._timeout) if seen.left_early else self._timeout
                if time.time() - seen.ended_at > patience:
                    return seen
        return None

    def _hung(self, running: Sequence[Observation]) -> list[Observation]:
        """The ranks that have been silent for too long; none when they only wait for one that moves."""
        if not any(seen.activity for seen in running):
            return []
        overdue = [seen for seen in running if seen.silent > self._patience(seen)]
        only_wait = all(seen.waits for seen in overdue) and len(overdue) < len(running)
        return [] if only_wait else overdue

    def _patience(self, seen: Observation) -> float:
        return self._timeout if seen.has_begun else max(self._timeout, _START_SECONDS)

    def _observe(self) -> list[Observation]:
        return [self._look_at(worker) for worker in self._group.workers]

    def _look_at(self, worker: Worker) -> Observation:
        rank = worker.rank
        exit_code = worker.poll()
        activity = read_activity(activity_path(self._control, rank)) or self._last.get(rank)
        if activity != self._last.get(rank):
            self._last[rank] = activity
            self._changed[rank] = time.monotonic()
        return Observation(
            rank=rank,
            exit_code=exit_code,
            ended_at=worker.ended_at,
            failure=diagnosis.read_failure(self._run_directory, rank, self._generation),
            activity=activity,
            silent=time.monotonic() - self._changed[rank],
            log=worker.log,
        )

    def _with_log(self, seen: Observation) -> Observation:
        return replace(seen, log_tail=self._group.workers[seen.rank].log_tail())

    def _with_stacks(self, ranks: Sequence[Observation]) -> list[Observation]:
        # A program that writes no heartbeat has not set up SIGUSR1 either, and would die of it.
        able = [seen.rank for seen in ranks if seen.exit_code is None and seen.activity]
        stacks = self._group.stacks(able)
        return [replace(seen, stack=stacks.get(seen.rank, "")) for seen in ranks]
