"""A pipeline schedule as data: what each rank does, in which order."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

from mpsdk.errors import ScheduleError


class Kind(StrEnum):
    """What an action does; stage and microbatch say with what."""

    FORWARD = "F"
    BACKWARD = "B"  # gradients of inputs and weights in one go
    BACKWARD_INPUT = "I"  # the gradient of the stage's input, which the stage before waits for
    BACKWARD_WEIGHT = "W"  # the gradients of the weights, which nobody waits for
    SEND_FORWARD = "SF"  # activation, to stage + 1
    RECEIVE_FORWARD = "RF"  # activation, from stage - 1
    SEND_BACKWARD = "SB"  # gradient, to stage - 1
    RECEIVE_BACKWARD = "RB"  # gradient, from stage + 1


COMPUTE = frozenset({Kind.FORWARD, Kind.BACKWARD, Kind.BACKWARD_INPUT, Kind.BACKWARD_WEIGHT})
SENDS = frozenset({Kind.SEND_FORWARD, Kind.SEND_BACKWARD})
RECEIVES = frozenset({Kind.RECEIVE_FORWARD, Kind.RECEIVE_BACKWARD})

# kind of the other end of a message, and how far away its stage is
_OTHER_END = {
    Kind.SEND_FORWARD: (Kind.RECEIVE_FORWARD, 1),
    Kind.RECEIVE_FORWARD: (Kind.SEND_FORWARD, -1),
    Kind.SEND_BACKWARD: (Kind.RECEIVE_BACKWARD, -1),
    Kind.RECEIVE_BACKWARD: (Kind.SEND_BACKWARD, 1),
}
_TEXT = re.compile(r"(SF|RF|SB|RB|[FBIW])(\d+)\.(\d+)")


class Action(NamedTuple):
    """One entry of a schedule. Written `F0.3`: forward, at stage 0, of microbatch 3."""

    kind: Kind
    stage: int
    microbatch: int

    def __str__(self) -> str:
        return f"{self.kind.value}{self.stage}.{self.microbatch}"

    @classmethod
    def parse(cls, text: str) -> Action:
        """The action that `str` wrote. Raises ScheduleError for any other text."""
        match = _TEXT.fullmatch(text)
        if match is None:
            raise ScheduleError(
                f"{text!r} is no action; one is written kind, stage, dot, microbatch: 'F0.3', 'SB1.0'"
            )
        kind, stage, microbatch = match.groups()
        return cls(Kind(kind), int(stage), int(microbatch))

    @property
    def peer_stage(self) -> int:
        """The stage at the other end of a message. Only for sends and receives."""
        return self.stage + _OTHER_END[self.kind][1]

    @property
    def other_end(self) -> Action:
        """The receive of a send, the send of a receive: `SF0.3` and `RF1.3`. Only for sends and receives."""
        kind, distance = _OTHER_END[self.kind]
        return Action(kind, self.stage + distance, self.microbatch)


FORWARD_ONLY = "forward-only"  # the name of schedules without a backward, for evaluation

Orders = tuple[tuple[Action, ...], ...]
"""Actions of each rank, in the order in which it does them."""


@dataclass(frozen=True)
class Schedule:
    """The actions of every rank for one pass over `microbatches` microbatches.

    Stages are numbered along the model; `stage_rank[stage]` is the pipeline rank that owns it. There are
    `degree * virtual_stages` of them. What the kinds ask of whoever runs them:

    - A rank does its actions in order. A send is posted, and its rank goes on at once: it never waits for its
      own send, only keeps the buffer until the send is done (all are, when every rank has come to its end).
    - `lookahead` 0: a receive is complete before the next action begins. Above 0: a receive is only posted,
      up to that many compute actions ahead, and the action that uses it waits for it.
    - Messages of a directed link (from rank a to rank b, activations and gradients together) are received in
      the order in which they are sent. Where the medium makes a send wait for its receive (NCCL), a link needs
      one channel for activations and one for gradients, neither waiting for the other nor for another link.
    """

    name: str
    degree: int
    microbatches: int
    virtual_stages: int
    actions: Orders
    stage_rank: tuple[int, ...]
    lookahead: int = 0

    @property
    def stages(self) -> int:
        return len(self.stage_rank)

    @property
    def trains(self) -> bool:
        """Whether there are backwards: in every schedule but the one for evaluation."""
        return self.name != FORWARD_ONLY

    @property
    def splits_backward(self) -> bool:
        """Whether weight gradients are actions of their own, as in zero-bubble schedules."""
        return any(action.kind is Kind.BACKWARD_WEIGHT for action in self.actions[0])

    @cached_property
    def turns_at_once(self) -> bool:
        """Whether at the last stage the backward of a microbatch comes directly after its forward."""
        last = self.stages - 1
        actions = [action for action in self.actions[self.stage_rank[last]] if action.kind in COMPUTE]
        return all(
            (after.stage, after.microbatch) == (last, action.microbatch) and after.kind is not Kind.FORWARD
            for action, after in pairwise(actions)
            if action.kind is Kind.FORWARD and action.stage == last
        )

    def stages_of(self, rank: int) -> tuple[int, ...]:
        """The stages that pipeline rank `rank` owns, in model order."""
        return tuple(stage for stage, owner in enumerate(self.stage_rank) if owner == rank)

    def link(self, action: Action) -> tuple[int, int]:
        """The directed link (sending rank, receiving rank) of a send or a receive."""
        here, there = self.stage_rank[action.stage], self.stage_rank[action.peer_stage]
        return (here, there) if action.kind in SENDS else (there, here)

    @cached_property
    def hash(self) -> str:
        """A digest of everything in the schedule, 32 hex digits: the same in every process."""
        digest = hashlib.blake2b(digest_size=16)
        head = (
            self.name,
            self.degree,
            self.microbatches,
            self.virtual_stages,
            self.stage_rank,
            self.lookahead,
        )
        digest.update(repr(head).encode())
        for actions in self.actions:
            digest.update(("\n" + " ".join(map(str, actions))).encode())
        return digest.hexdigest()

    def __str__(self) -> str:
        """One line a rank: `0: F0.0 SF0.0 ...`."""
        return "\n".join(
            f"{rank}: {' '.join(map(str, actions))}" for rank, actions in enumerate(self.actions)
        )
