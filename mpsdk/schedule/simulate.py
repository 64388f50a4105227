"""When each action of a schedule runs, given what each costs: makespan, bubbles, microbatches in flight."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from mpsdk.errors import ScheduleError
from mpsdk.schedule.actions import Action, Kind, Schedule

PerStage = float | Sequence[float]


@dataclass(frozen=True)
class Costs:
    """Time that an action takes, in any one unit: one number for all stages, or one for each stage.

    `communication` is the time of one message, by the stage that sends it. The messages of a directed link go one
    after another, those of different links at the same time.
    """

    forward: PerStage = 1.0
    backward: PerStage = 2.0  # both parts in one
    backward_input: PerStage = 1.0
    backward_weight: PerStage = 1.0
    communication: PerStage = 0.0


class Span(NamedTuple):
    """A compute action and the time from `start` to `end` in which it runs."""

    action: Action
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """A schedule in time. Each tuple has one entry a rank; `spans` are its compute actions, in order."""

    schedule: Schedule
    spans: tuple[tuple[Span, ...], ...]
    makespan: float
    busy: tuple[float, ...]
    peak_in_flight: tuple[int, ...]

    @property
    def bubble(self) -> tuple[float, ...]:
        """Makespan minus busy time."""
        return tuple(self.makespan - busy for busy in self.busy)

    @property
    def bubble_fraction(self) -> float:
        """The part of all ranks' time that is bubble, from 0 to 1."""
        total = self.makespan * len(self.busy)
        return sum(self.bubble) / total if total else 0.0


def simulate(schedule: Schedule, costs: Costs | None = None) -> Timeline:
    """Run the schedule on paper. Sends take no time of their rank; an action waits for the message that it uses.

    Since each rank does its actions in a fixed order, the times are longest paths and need no clock: a rank goes on
    until it lacks a message, and the rank that sends it wakes it.

    Raises:
        ScheduleError: ranks wait for each other, or there are costs for another number of stages.
    """
    costs = costs or Costs()
    stages, microbatches, owner = schedule.stages, schedule.microbatches, schedule.stage_rank
    forward_time = _each_stage("forward", costs.forward, stages)
    backward_time = _each_stage("backward", costs.backward, stages)
    input_time = _each_stage("backward_input", costs.backward_input, stages)
    weight_time = _each_stage("backward_weight", costs.backward_weight, stages)
    message_time = _each_stage("communication", costs.communication, stages)
    from_before = [stage > 0 and owner[stage - 1] != owner[stage] for stage in range(stages)]
    from_after = [stage + 1 < stages and owner[stage + 1] != owner[stage] for stage in range(stages)]

    # when the message for a (stage, microbatch) arrives; None while it has not been sent
    activations: list[float | None] = [None] * (stages * microbatches)
    gradients: list[float | None] = [None] * (stages * microbatches)
    link_free: dict[tuple[int, int], float] = {}
    spans: list[list[Span]] = [[] for _ in schedule.actions]
    position = [0] * len(schedule.actions)
    clock = [0.0] * len(schedule.actions)
    runnable = deque(range(len(schedule.actions)))
    asleep: set[int] = set()

    while runnable:
        rank = runnable.popleft()
        actions, row, now, at = schedule.actions[rank], spans[rank], clock[rank], position[rank]
        while at < len(actions):
            action = actions[at]
            kind, stage, microbatch = action
            arrives: float | None = now
            if kind is Kind.FORWARD:
                duration = forward_time[stage]
                if from_before[stage]:
                    arrives = activations[stage * microbatches + microbatch]
            elif kind is Kind.BACKWARD or kind is Kind.BACKWARD_INPUT:
                duration = (backward_time if kind is Kind.BACKWARD else input_time)[stage]
                if from_after[stage]:
                    arrives = gradients[stage * microbatches + microbatch]
            elif kind is Kind.BACKWARD_WEIGHT:
                duration = weight_time[stage]
            else:
                at += 1
                if kind is Kind.SEND_FORWARD or kind is Kind.SEND_BACKWARD:
                    to, board = (
                        (stage + 1, activations) if kind is Kind.SEND_FORWARD else (stage - 1, gradients)
                    )
                    link = (rank, owner[to])
                    gone = max(now, link_free.get(link, 0.0)) + message_time[stage]
                    link_free[link] = board[to * microbatches + microbatch] = gone
                    if owner[to] in asleep:
                        asleep.remove(owner[to])
                        runnable.append(owner[to])
                continue
            if arrives is None:
                asleep.add(rank)
                break
            start = max(now, arrives)
            now = start + duration
            row.append(Span(action, start, now))
            at += 1
        clock[rank], position[rank] = now, at

    if asleep:
        waits = (f"rank {rank} at {schedule.actions[rank][position[rank]]}" for rank in sorted(asleep))
        raise ScheduleError(f"{schedule.name}: ranks wait for each other: {', '.join(waits)}")
    return Timeline(
        schedule=schedule,
        spans=tuple(map(tuple, spans)),
        makespan=max(clock),
        busy=tuple(sum(end - start for _, start, end in row) for row in spans),
        peak_in_flight=peak_in_flight(schedule),
    )


def peak_in_flight(schedule: Schedule) -> tuple[int, ...]:
    """For each rank, how many (stage, microbatch) pairs it has in flight at most, over all its stages together.

    A pair is in flight from its forward until its last backward part. Without backwards, only during its forward.
    """
    return tuple(_peak(actions, schedule.trains) for actions in schedule.actions)


def stage_in_flight(schedule: Schedule) -> tuple[int, ...]:
    """For each stage, how many microbatches it has in flight at most; see `peak_in_flight`."""
    return tuple(
        _peak((action for action in schedule.actions[rank] if action.stage == stage), schedule.trains)
        for stage, rank in enumerate(schedule.stage_rank)
    )


def _peak(actions: Iterable[Action], trains: bool) -> int:
    count = peak = 0
    for kind, _, _ in actions:
        if kind is Kind.FORWARD:
            count += 1
            peak = max(peak, count)
        if kind is Kind.BACKWARD or kind is Kind.BACKWARD_WEIGHT or (kind is Kind.FORWARD and not trains):
            count -= 1
    return peak


def _each_stage(name: str, cost: PerStage, stages: int) -> list[float]:
    values = [float(cost)] * stages if isinstance(cost, int | float) else [float(value) for value in cost]
    if len(values) != stages or min(values) < 0:
        raise ScheduleError(
            f"Costs.{name} = {cost} must be one number or {stages}, one a stage, none below 0"
        )
    return values
