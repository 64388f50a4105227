"""The schedules: compute orders of each rank, from degree p, microbatches m and virtual stages v.

A new schedule is a function here and a line in `GENERATORS`; `add_communication` gives it sends and receives.
What each costs and holds is in docs/schedules.md, and tested against `simulate`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain

from mpsdk.errors import ScheduleError
from mpsdk.schedule.actions import Action, Kind, Orders, Schedule
from mpsdk.schedule.communication import add_communication

FORWARD_ONLY = "forward-only"


def _row(kind: Kind, stage: int, microbatches: int) -> list[Action]:
    """One kind of action at one stage, for each microbatch."""
    return [Action(kind, stage, microbatch) for microbatch in range(microbatches)]


def _warm_then_alternate(
    forwards: Sequence[Action], backwards: Sequence[Action], warmup: int
) -> tuple[Action, ...]:
    """`warmup` forwards, then one forward and one backward in turn, then the backwards that are left."""
    warmup = min(warmup, len(forwards))
    steady = len(forwards) - warmup
    in_turn = chain.from_iterable(zip(forwards[warmup:], backwards, strict=False))
    return (*forwards[:warmup], *in_turn, *backwards[steady:])


def gpipe(degree: int, microbatches: int, virtual_stages: int) -> Orders:
    """All forwards, then all backwards (Huang et al. 2018, arXiv:1811.06965). m in flight."""
    return tuple(
        (*_row(Kind.FORWARD, rank, microbatches), *_row(Kind.BACKWARD, rank, microbatches))
        for rank in range(degree)
    )


def one_forward_one_backward(degree: int, microbatches: int, virtual_stages: int) -> Orders:
    """1F1B (PipeDream-Flush; Narayanan et al. 2021, arXiv:2006.09503): forwards and backwards take turns.

    Rank r warms up with p - 1 - r forwards, so that at most min(m, p - r) are in flight.
    """
    return tuple(
        _warm_then_alternate(
            _row(Kind.FORWARD, rank, microbatches), _row(Kind.BACKWARD, rank, microbatches), degree - 1 - rank
        )
        for rank in range(degree)
    )


def interleaved(degree: int, microbatches: int, virtual_stages: int) -> Orders:
    """1F1B over v stages a rank, p apart (Narayanan et al. 2021, arXiv:2104.04473, section 2.2).

    Megatron's order: rounds of p microbatches, each through all v stages of the rank before the next round.
    Rank r warms up with 2(p - 1 - r) + (v - 1)p forwards, and has at most min(vm, that + 1) in flight.
    """

    def rounds(kind: Kind, rank: int) -> list[Action]:
        chunks = range(virtual_stages) if kind is Kind.FORWARD else reversed(range(virtual_stages))
        stages = [chunk * degree + rank for chunk in chunks]
        return [
            Action(kind, stage, start + offset)
            for start in range(0, microbatches, degree)
            for stage in stages
            for offset in range(degree)
        ]

    return tuple(
        _warm_then_alternate(
            rounds(Kind.FORWARD, rank),
            rounds(Kind.BACKWARD, rank),
            2 * (degree - 1 - rank) + (virtual_stages - 1) * degree,
        )
        for rank in range(degree)
    )


def loop(degree: int, virtual_stages: int) -> tuple[int, ...]:
    """The ranks of the stages, going round and round: 0 1 2 0 1 2."""
    return tuple(range(degree)) * virtual_stages


@dataclass(frozen=True)
class Generator:
    """How a schedule is made, and for which sizes there is one."""

    orders: Callable[[int, int, int], Orders]  # (degree, microbatches, virtual stages)
    placement: Callable[[int, int], tuple[int, ...]] = (
        loop  # (degree, virtual stages) -> the rank of each stage
    )
    virtual_stages: tuple[int, int | None] = (1, 1)  # fewest and most
    least_degree: int = 1
    whole_rounds: bool = False  # microbatches must be a multiple of degree


GENERATORS = {
    "gpipe": Generator(gpipe),
    "1f1b": Generator(one_forward_one_backward),
    "interleaved": Generator(interleaved, virtual_stages=(2, None), least_degree=2, whole_rounds=True),
}


def generate(
    name: str, degree: int, microbatches: int, virtual_stages: int = 1, *, lookahead: int = 0
) -> Schedule:
    """The schedule `name` for `degree` pipeline ranks with `virtual_stages` stages each.

    Args:
        name: one of `GENERATORS`.
        degree: pipeline ranks, at least 1.
        microbatches: at least 1; `interleaved` asks for a multiple of `degree`.
        virtual_stages: stages a rank: 1; at least 2 for `interleaved`; exactly 2 for `zb-v`.
        lookahead: compute actions by which a receive is posted ahead of its use; see `Schedule`.

    Raises:
        ScheduleError: no such schedule, or none for these sizes. The message says which would do.
    """
    generator = GENERATORS.get(name)
    if generator is None:
        raise ScheduleError(f"there is no schedule {name!r}; there are {', '.join(map(repr, GENERATORS))}")
    least, most = generator.virtual_stages
    if degree < generator.least_degree:
        raise ScheduleError(f"{name} needs a degree of at least {generator.least_degree}, got {degree}")
    if microbatches < 1 or lookahead < 0:
        raise ScheduleError(
            f"{name}: microbatches {microbatches} and lookahead {lookahead} must be at least 1 and 0"
        )
    if virtual_stages < least or (most is not None and virtual_stages > most):
        allowed = f"exactly {least}" if most == least else f"at least {least}"
        raise ScheduleError(f"{name} has {allowed} virtual stages a rank, got {virtual_stages}")
    if generator.whole_rounds and microbatches % degree:
        nearest = (max(degree, microbatches // degree * degree), (microbatches // degree + 1) * degree)
        raise ScheduleError(
            f"{name} goes in rounds of {degree} microbatches, one a rank: {microbatches} is no multiple; "
            f"use {nearest[0]} or {nearest[1]}"
        )
    orders = generator.orders(degree, microbatches, virtual_stages)
    stage_rank = generator.placement(degree, virtual_stages)
    actions = add_communication(orders, stage_rank, lookahead=lookahead)
    return Schedule(name, degree, microbatches, virtual_stages, actions, stage_rank, lookahead)


def forward_only(schedule: Schedule) -> Schedule:
    """The forwards of `schedule` alone, for evaluation, with the same stages on the same ranks.

    What is left of an order that can't deadlock can't either: forwards wait for nothing but forwards.
    """
    orders = tuple(
        tuple(action for action in actions if action.kind is Kind.FORWARD) for actions in schedule.actions
    )
    return Schedule(
        FORWARD_ONLY,
        schedule.degree,
        schedule.microbatches,
        schedule.virtual_stages,
        add_communication(orders, schedule.stage_rank, lookahead=schedule.lookahead),
        schedule.stage_rank,
        schedule.lookahead,
    )
