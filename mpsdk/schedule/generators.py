"""The schedules: compute orders of each rank, from degree p, microbatches m and virtual stages v.

A new schedule is a function here and a line in `GENERATORS`; `add_communication` gives it sends and receives.
What each costs and holds is in docs/schedules.md, and tested against `simulate`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

from mpsdk.errors import ScheduleError
from mpsdk.schedule.actions import FORWARD_ONLY, Action, Kind, Orders, Schedule
from mpsdk.schedule.communication import add_communication

_SPLIT = (Kind.FORWARD, Kind.BACKWARD_INPUT, Kind.BACKWARD_WEIGHT)


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


def zb_h1(degree: int, microbatches: int, virtual_stages: int) -> Orders:
    """ZB-H1 (Qi et al. 2024, arXiv:2401.10241, section 2.1): 1F1B with the weights' backward put off to fill bubbles.

    Rank r starts the weights' backwards r microbatches late, which brings every rank to the p in flight that only
    rank 0 has in 1F1B, and no further. With m >= p each rank is idle for (p - 1)(F + I - W), as published, if W is at
    most F and I; for any costs it is (p - 1)(F + I - min(F, I, W)), by simulation.
    """

    def order(rank: int) -> Iterator[Action]:
        forwards, inputs = (_row(kind, rank, microbatches) for kind in (Kind.FORWARD, Kind.BACKWARD_INPUT))
        for action in _warm_then_alternate(forwards, inputs, degree - 1 - rank):
            yield action
            late = action.microbatch - rank
            if action.kind is Kind.BACKWARD_INPUT and late >= 0:
                yield Action(Kind.BACKWARD_WEIGHT, rank, late)
        yield from _row(Kind.BACKWARD_WEIGHT, rank, microbatches)[max(0, microbatches - rank) :]

    return tuple(tuple(order(rank)) for rank in range(degree))


def zb_v(degree: int, microbatches: int, virtual_stages: int) -> Orders:
    """ZB-V (Qi et al. 2024, arXiv:2401.10241, section 6): rank r has the stages r and 2p - 1 - r, a V.

    The last stage is on the first rank's side of the V, so gradients come back soon, and with F = I = W and
    m >= 2p - 1 no rank is idle from its first action to its last. At most 2p half-size stages in flight: as 1F1B.
    Fewer than 2p - 1 microbatches run in the order of 2p - 1, the missing ones left out.
    """
    whole = max(microbatches, 2 * degree - 1)

    def order(rank: int) -> Iterator[Action]:
        down, up = rank, 2 * degree - 1 - rank  # the rank's stages, one on each leg of the V
        f_down, i_down, w_down = ((kind, down) for kind in _SPLIT)
        f_up, i_up, w_up = ((kind, up) for kind in _SPLIT)
        below = degree - rank  # ranks from here to the tip
        begun = below + degree - 1  # forwards down in the first two phases
        phases = (  # what is done in turn, and how many times
            ((f_down,), 2 * below - 1),
            ((f_up, f_down), rank),
            ((f_up, i_up, w_up), below),
            ((f_down, i_down, w_down, f_up, i_up, w_up), whole - begun),
            ((i_down, w_down, f_up, i_up, w_up), begun - degree),
            ((i_down, i_up), rank),
            ((i_down, w_down), below),
            ((w_up,), rank),
            ((w_down,), rank),
        )
        done = dict.fromkeys((f_down, i_down, w_down, f_up, i_up, w_up), 0)
        for pattern, times in phases:
            for step in pattern * times:
                kind, stage = step
                if done[step] < microbatches:
                    yield Action(kind, stage, done[step])
                done[step] += 1

    return tuple(tuple(order(rank)) for rank in range(degree))


def forward_only(degree: int, microbatches: int, stage_rank: tuple[int, ...]) -> Orders:
    """Forwards alone, for evaluation, on the stages of another schedule.

    Each rank goes by the slot in which an action would run if a forward took one slot and nothing ever waited. A
    stage's slot comes after that of the stage before, so this is free of deadlock for any placement. For `loop`
    and `vee` a rank has no slot twice, so nothing does wait: v*m + p - 1 slots and 2m + 2p - 2.
    """
    virtual_stages = len(stage_rank) // degree
    looped = stage_rank == loop(degree, virtual_stages)

    def slot(action: Action) -> int:
        rounds, offset = divmod(action.microbatch, degree)
        start = rounds * len(stage_rank) + offset if looped else virtual_stages * action.microbatch
        return start + action.stage

    def row(rank: int) -> Iterator[Action]:
        stages = (stage for stage, owner in enumerate(stage_rank) if owner == rank)
        return chain.from_iterable(_row(Kind.FORWARD, stage, microbatches) for stage in stages)

    return tuple(tuple(sorted(row(rank), key=slot)) for rank in range(degree))


def loop(degree: int, virtual_stages: int) -> tuple[int, ...]:
    """The ranks of the stages, going round and round: 0 1 2 0 1 2."""
    return tuple(range(degree)) * virtual_stages


def vee(degree: int, virtual_stages: int) -> tuple[int, ...]:
    """The ranks of the stages, there and back: 0 1 2 2 1 0."""
    return (*range(degree), *reversed(range(degree)))


@dataclass(frozen=True)
class Generator:
    """How a schedule is made, and for which sizes there is one."""

    orders: Callable[[int, int, int], Orders]  # of degree, microbatches, virtual stages
    # of degree, virtual stages: the rank of each stage
    placement: Callable[[int, int], tuple[int, ...]] = loop
    virtual_stages: tuple[int, int | None] = (1, 1)  # fewest and most
    least_degree: int = 1
    whole_rounds: bool = False  # microbatches must be a multiple of degree


GENERATORS = {
    "gpipe": Generator(gpipe),
    "1f1b": Generator(one_forward_one_backward),
    "interleaved": Generator(interleaved, virtual_stages=(2, None), least_degree=2, whole_rounds=True),
    "zb-h1": Generator(zb_h1),
    "zb-v": Generator(zb_v, placement=vee, virtual_stages=(2, 2)),
}


def generate(
    name: str,
    degree: int,
    microbatches: int,
    virtual_stages: int = 1,
    stage_rank: tuple[int, ...] | None = None,
    *,
    lookahead: int = 0,
) -> Schedule:
    """The schedule `name` for `degree` pipeline ranks with `virtual_stages` stages each.

    Args:
        name: one of `GENERATORS`, or `"forward-only"`.
        degree: pipeline ranks, at least 1.
        microbatches: at least 1; `interleaved` asks for a multiple of `degree`.
        virtual_stages: stages a rank: 1; at least 2 for `interleaved`; exactly 2 for `zb-v`.
        stage_rank: for `"forward-only"`, the rank of each stage in the schedule that trains; the others know their own.
        lookahead: compute actions by which a receive is posted ahead of its use; see `Schedule`.

    Raises:
        ScheduleError: no such schedule, or none for these sizes. The message says which would do.
    """
    if degree < 1 or microbatches < 1 or virtual_stages < 1 or lookahead < 0:
        raise ScheduleError(
            f"{name}: degree {degree}, microbatches {microbatches} and virtual_stages {virtual_stages} must be "
            f"at least 1, lookahead {lookahead} at least 0"
        )
    if name == FORWARD_ONLY:
        stage_rank = loop(degree, virtual_stages) if stage_rank is None else tuple(stage_rank)
        if sorted(stage_rank) != sorted(loop(degree, virtual_stages)):
            raise ScheduleError(
                f"{name}: stage_rank {stage_rank} must give each of {degree} ranks {virtual_stages} stages"
            )
        orders = forward_only(degree, microbatches, stage_rank)
    else:
        generator = _generator(name, degree, microbatches, virtual_stages)
        placement = generator.placement(degree, virtual_stages)
        if stage_rank is not None and tuple(stage_rank) != placement:
            raise ScheduleError(
                f"{name} puts its stages on ranks {placement}; stage_rank {stage_rank} differs"
            )
        stage_rank = placement
        orders = generator.orders(degree, microbatches, virtual_stages)
    actions = add_communication(orders, stage_rank, lookahead=lookahead)
    return Schedule(name, degree, microbatches, virtual_stages, actions, stage_rank, lookahead)


def _generator(name: str, degree: int, microbatches: int, virtual_stages: int) -> Generator:
    """The generator of `name`. Raises ScheduleError when there is none for these sizes."""
    generator = GENERATORS.get(name)
    if generator is None:
        raise ScheduleError(f"there is no schedule {name!r}; there are {', '.join(map(repr, GENERATORS))}")
    if degree < generator.least_degree:
        raise ScheduleError(f"{name} needs a degree of at least {generator.least_degree}, got {degree}")
    least, most = generator.virtual_stages
    if virtual_stages < least or (most is not None and virtual_stages > most):
        allowed = f"exactly {least}" if most == least else f"at least {least}"
        raise ScheduleError(f"{name} needs {allowed} virtual stages a rank, got {virtual_stages}")
    if generator.whole_rounds and microbatches % degree:
        above = (microbatches // degree + 1) * degree
        fitting = f"{above - degree} or {above}" if above > degree else f"{above}"
        raise ScheduleError(
            f"{name} goes in rounds of {degree} microbatches, one for each rank: {microbatches} is no multiple; "
            f"{fitting} would do"
        )
    return generator
