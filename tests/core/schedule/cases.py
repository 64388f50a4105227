"""Schedules of all names and sizes for property tests, and an executor that makes ranks and messages late at random."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from fractions import Fraction
from random import Random

from hypothesis import strategies as st

from mpsdk.schedule import FORWARD_ONLY, GENERATORS, Kind, Schedule, generate

lookaheads = st.sampled_from([0, 0, 0, 1, 2, 7])


degrees = st.integers(1, 7)


@st.composite
def schedules(draw, names=tuple(GENERATORS), degree=degrees, lookahead=lookaheads):
    """Any schedule that there is, with few stages and microbatches."""
    name = draw(st.sampled_from(names))
    p = draw(degree)
    v, rounds = 1, None
    if name == "interleaved":
        p, v, rounds = max(p, 2), draw(st.integers(2, 4)), draw(st.integers(1, 4))
    if name == "zb-v":
        v = 2
    m = p * rounds if rounds else draw(st.integers(1, 3 * p + 2))
    return generate(name, p, m, v, lookahead=draw(lookahead))


def evaluation_of(schedule: Schedule) -> Schedule:
    return generate(
        FORWARD_ONLY,
        schedule.degree,
        schedule.microbatches,
        schedule.virtual_stages,
        schedule.stage_rank,
        lookahead=schedule.lookahead,
    )


class Toy:
    """A model with one weight a stage, trained by a schedule in exact arithmetic: stage s makes w_s * x of x.

    Each rank is a process of its own that knows its actions and its channels, nothing else. Every turn lets one rank,
    drawn at random, do one action if it can; a message takes a random number of turns. A channel (link and direction)
    hands out messages in the order sent; `room` is how many it takes before a sender has to wait for a receive.
    """

    def __init__(
        self, schedule: Schedule, random: Random, *, room: int | None = None, slowest: int = 20
    ) -> None:
        self.schedule, self.random, self.room, self.slowest = schedule, random, room, slowest
        self.weights = [Fraction(random.randint(2, 9)) for _ in schedule.stage_rank]
        self.inputs = [Fraction(random.randint(1, 9)) for _ in range(schedule.microbatches)]
        self.outputs: dict[int, Fraction] = {}
        self.gradients: dict[int, Fraction] = defaultdict(Fraction)  # of the sum of the outputs, by stage
        self.channels: dict[tuple, list[tuple[int, tuple[int, int], Fraction]]] = defaultdict(list)
        self.posted: dict[tuple, int] = defaultdict(int)
        self.sent: dict[tuple, int] = defaultdict(int)
        self.turn = 0

    def run(self) -> None:
        ranks = [self._rank(rank) for rank in range(self.schedule.degree)]
        alive = list(range(len(ranks)))
        patience = 0
        while alive:
            self.turn += 1
            rank = self.random.choice(alive)
            moved = next(ranks[rank], None)
            if moved is None:
                alive.remove(rank)
            patience = 0 if moved is not False else patience + 1
            assert patience < 50 * len(ranks) + self.slowest, f"ranks {alive} wait for each other"
        assert not any(self.channels.values()), "a message was never received"

    def _rank(self, rank: int) -> Iterator[bool]:
        """Yields True after each action, False for a turn spent waiting."""
        schedule, here = self.schedule, {}
        arrived: dict[tuple[Kind, int, int], Fraction] = {}
        posted: list[tuple[tuple, Kind, int, int]] = []
        stored: dict[tuple[int, int], Fraction] = {}  # inputs of stages in flight

        def fetch(kind: Kind, stage: int, microbatch: int) -> Iterator[bool]:
            """Take what has come on the channels until the wanted message is there."""
            while (kind, stage, microbatch) not in arrived:
                for receive in [*posted]:
                    channel, *what = receive
                    queue = self.channels[channel]
                    if queue and queue[0][0] <= self.turn:
                        _, (to, number), value = queue.pop(0)
                        assert [to, number] == what[1:], f"{what} received stage {to}, microbatch {number}"
                        arrived[tuple(what)] = value
                        posted.remove(receive)
                        break
                else:
                    yield False

        for action in schedule.actions[rank]:
            kind, stage, microbatch = action
            key = (stage, microbatch)
            if kind in (Kind.SEND_FORWARD, Kind.SEND_BACKWARD):
                channel = (*schedule.link(action), kind is Kind.SEND_FORWARD)
                while self.room is not None and self.sent[channel] - self.posted[channel] >= self.room:
                    yield False
                self.sent[channel] += 1
                to = stage + 1 if kind is Kind.SEND_FORWARD else stage - 1
                queue = self.channels[channel]
                when = max(self.turn + self.random.randint(0, self.slowest), queue[-1][0] if queue else 0)
                queue.append((when, (to, microbatch), here.pop((kind, stage, microbatch))))
            elif kind in (Kind.RECEIVE_FORWARD, Kind.RECEIVE_BACKWARD):
                channel = (*schedule.link(action), kind is Kind.RECEIVE_FORWARD)
                self.posted[channel] += 1
                posted.append((channel, *action))
                if schedule.lookahead == 0:
                    yield from fetch(*action)
            elif kind is Kind.FORWARD:
                if stage == 0:
                    value = self.inputs[microbatch]
                elif schedule.stage_rank[stage - 1] == rank:
                    value = here.pop((Kind.SEND_FORWARD, stage - 1, microbatch))
                else:
                    yield from fetch(Kind.RECEIVE_FORWARD, stage, microbatch)
                    value = arrived.pop((Kind.RECEIVE_FORWARD, stage, microbatch))
                stored[key] = value
                if stage == schedule.stages - 1:
                    self.outputs[microbatch] = value * self.weights[stage]
                else:
                    here[Kind.SEND_FORWARD, stage, microbatch] = value * self.weights[stage]
            elif kind in (Kind.BACKWARD, Kind.BACKWARD_INPUT):
                if stage == schedule.stages - 1:
                    gradient = Fraction(1)
                elif schedule.stage_rank[stage + 1] == rank:
                    gradient = here.pop((Kind.SEND_BACKWARD, stage + 1, microbatch))
                else:
                    yield from fetch(Kind.RECEIVE_BACKWARD, stage, microbatch)
                    gradient = arrived.pop((Kind.RECEIVE_BACKWARD, stage, microbatch))
                if stage > 0:
                    here[Kind.SEND_BACKWARD, stage, microbatch] = gradient * self.weights[stage]
                if kind is Kind.BACKWARD:
                    self.gradients[stage] += gradient * stored.pop(key)
                else:
                    here["weight", stage, microbatch] = gradient
            else:
                self.gradients[stage] += here.pop(("weight", stage, microbatch)) * stored.pop(key)
            yield True
        assert not schedule.trains or (not here and not stored and not arrived), f"rank {rank} keeps {here}"

    def check(self) -> None:
        """The outputs and gradients of one process: y = x * w_0 * ... * w_last, dy/dw_s = y / w_s."""
        product = Fraction(1)
        for weight in self.weights:
            product *= weight
        assert self.outputs == {number: value * product for number, value in enumerate(self.inputs)}
        if self.schedule.trains:
            whole = sum(self.outputs.values())
            assert self.gradients == {stage: whole / weight for stage, weight in enumerate(self.weights)}
