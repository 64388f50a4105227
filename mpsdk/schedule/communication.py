"""Puts the sends and receives into compute orders."""

from __future__ import annotations

from collections import defaultdict, deque

from mpsdk.errors import ScheduleError
from mpsdk.schedule.actions import Action, Kind, Orders

_BACKWARDS = (Kind.BACKWARD, Kind.BACKWARD_INPUT)


def receive_for(action: Action, stage_rank: tuple[int, ...]) -> Action | None:
    """The receive that compute action `action` uses; None when its input is on its own rank already."""
    kind, stage, microbatch = action
    here = stage_rank[stage]
    if kind is Kind.FORWARD and stage > 0 and stage_rank[stage - 1] != here:
        return Action(Kind.RECEIVE_FORWARD, stage, microbatch)
    if kind in _BACKWARDS and stage + 1 < len(stage_rank) and stage_rank[stage + 1] != here:
        return Action(Kind.RECEIVE_BACKWARD, stage, microbatch)
    return None


def send_after(action: Action, stage_rank: tuple[int, ...]) -> Action | None:
    """The send of what compute action `action` makes; None when it stays on its own rank."""
    kind, stage, microbatch = action
    here = stage_rank[stage]
    if kind is Kind.FORWARD and stage + 1 < len(stage_rank) and stage_rank[stage + 1] != here:
        return Action(Kind.SEND_FORWARD, stage, microbatch)
    if kind in _BACKWARDS and stage > 0 and stage_rank[stage - 1] != here:
        return Action(Kind.SEND_BACKWARD, stage, microbatch)
    return None


def add_communication(orders: Orders, stage_rank: tuple[int, ...], *, lookahead: int = 0) -> Orders:
    """Compute orders with each send right after its compute action, each receive `lookahead` of them before its use.

    Virtual stages can need messages of one link in another order than they are sent in. A link is a queue, so a
    receive takes with it those that were sent before it. That never makes a rank wait longer: what was sent
    earlier on the same link is there earlier, and its send can't depend on what this rank does later.

    Raises ScheduleError when an action needs a message that no rank sends.
    """
    queues: dict[tuple[int, int], deque[Action]] = defaultdict(
        deque
    )  # receives of each link, in the order of the sends
    for rank, order in enumerate(orders):
        for action in order:
            send = send_after(action, stage_rank)
            if send is not None:
                receive = send.other_end
                queues[rank, stage_rank[receive.stage]].append(receive)

    programs: list[tuple[Action, ...]] = []
    for rank, order in enumerate(orders):
        program: list[Action] = []
        early: set[Action] = set()  # received in front of a message sent after them
        looked_at = 0
        for position, action in enumerate(order):
            for coming in order[looked_at : position + lookahead + 1]:
                receive = receive_for(coming, stage_rank)
                if receive is None:
                    continue
                if receive in early:
                    early.remove(receive)
                    continue
                taken = _take(queues[stage_rank[receive.peer_stage], rank], receive)
                if not taken:
                    raise ScheduleError(
                        f"rank {rank}: {coming} needs {receive}, but no rank does {receive.other_end} for it"
                    )
                early.update(taken[:-1])
                program += taken
            looked_at = position + lookahead + 1
            program.append(action)
            send = send_after(action, stage_rank)
            if send is not None:
                program.append(send)
        programs.append(tuple(program))
    return tuple(programs)


def _take(queue: deque[Action], wanted: Action) -> list[Action]:
    """Everything up to `wanted`, off the queue; nothing when it isn't there."""
    taken: list[Action] = []
    while queue:
        taken.append(queue.popleft())
        if taken[-1] == wanted:
            return taken
    return []
