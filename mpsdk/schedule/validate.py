"""Proof that a schedule is complete, in an order that works, and free of deadlock."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterator, Sequence

from mpsdk.errors import ScheduleError
from mpsdk.schedule.actions import RECEIVES, Action, Kind, Schedule
from mpsdk.schedule.communication import receive_for

Link = tuple[int, int]  # sending rank, receiving rank
Channel = tuple[int, int, bool]  # a link, for activations (True) or gradients

# What has been done for a (stage, microbatch), one bit each; a whole backward is both of its parts.
_BITS = {
    Kind.FORWARD: 1,
    Kind.BACKWARD_INPUT: 2,
    Kind.BACKWARD_WEIGHT: 4,
    Kind.BACKWARD: 2 | 4,
    Kind.RECEIVE_FORWARD: 8,
    Kind.RECEIVE_BACKWARD: 16,
    Kind.SEND_FORWARD: 32,
    Kind.SEND_BACKWARD: 64,
}


def validate(schedule: Schedule) -> None:
    """Check that every rank can do its actions in order, whatever the delays, and that they are the whole work.

    1. Each (stage, microbatch) has its forward once and its backward once, whole or in its two parts, on the
       stage's rank, and every message between two ranks is sent once and received once.
    2. On its rank, each action comes after what it needs: a forward after the activation, a backward after the
       forward and the gradient, the weights' backward after the input's, a send after what it sends.
    3. On each directed link the receives come in the order of the sends.
    4. No rank waits for ever. Neither when a link holds any number of messages (buffered), nor when it has one
       channel for activations and one for gradients, each holding one message until the receive for it is
       posted, and the rank that sends a second one on a channel waits for that (rendezvous). Receives wait for
       their message; with lookahead they are only posted, and the action that uses the message waits.

    Raises:
        ScheduleError: the first thing that is wrong, with rank and action.
    """
    _check_placement(schedule)
    _check_work(schedule)
    _check_links(schedule)
    _check_progress(schedule, rendezvous=False)
    _check_progress(schedule, rendezvous=True)


def _check_placement(schedule: Schedule) -> None:
    owner, degree, stages = schedule.stage_rank, schedule.degree, schedule.degree * schedule.virtual_stages
    if len(schedule.actions) != degree or len(owner) != stages:
        raise ScheduleError(
            f"{schedule.name}: actions of {len(schedule.actions)} ranks and {len(owner)} stages, where degree "
            f"{degree} with {schedule.virtual_stages} virtual stages makes {degree} ranks and {stages} stages"
        )
    for rank, actions in enumerate(schedule.actions):
        for action in actions:
            _, stage, microbatch = action
            if not (0 <= stage < stages and 0 <= microbatch < schedule.microbatches):
                text = f"{action} is outside the {stages} stages and {schedule.microbatches} microbatches"
                raise ScheduleError(f"rank {rank}: {text}")
            if owner[stage] != rank:
                raise ScheduleError(
                    f"rank {rank}: {action} is for rank {owner[stage]}, the owner of its stage"
                )


Needs = dict[Kind, Sequence[tuple[Kind, int]]]


def _needs(schedule: Schedule, stage: int) -> Needs:
    """What there is to do at `stage`, and what its rank must have done before: kinds, and their stages."""
    owner, last = schedule.stage_rank, schedule.stages - 1
    far_before = stage > 0 and owner[stage - 1] != owner[stage]
    far_after = stage < last and owner[stage + 1] != owner[stage]
    activation = (Kind.RECEIVE_FORWARD, stage) if far_before else (Kind.FORWARD, stage - 1)
    gradient = (Kind.RECEIVE_BACKWARD, stage) if far_after else (Kind.BACKWARD_INPUT, stage + 1)
    needs: Needs = {Kind.FORWARD: [activation] if stage > 0 else []}
    if far_before:
        needs[Kind.RECEIVE_FORWARD] = []
    if far_after:
        needs[Kind.SEND_FORWARD] = [(Kind.FORWARD, stage)]
    if schedule.trains:
        backward = [(Kind.FORWARD, stage), *([gradient] if stage < last else [])]
        needs[Kind.BACKWARD] = needs[Kind.BACKWARD_INPUT] = backward
        needs[Kind.BACKWARD_WEIGHT] = [(Kind.BACKWARD_INPUT, stage)]
        if far_after:
            needs[Kind.RECEIVE_BACKWARD] = []
        if far_before:
            needs[Kind.SEND_BACKWARD] = [(Kind.BACKWARD_INPUT, stage)]
    return needs


def _check_work(schedule: Schedule) -> None:
    microbatches = schedule.microbatches
    needs = [_needs(schedule, stage) for stage in range(schedule.stages)]
    done = bytearray(schedule.stages * microbatches)
    for rank, actions in enumerate(schedule.actions):
        for action in actions:
            kind, stage, microbatch = action
            bits, at = _BITS[kind], stage * microbatches + microbatch
            if kind not in needs[stage]:
                why = (
                    "no other rank is at that end of the stage" if schedule.trains else "it only goes forward"
                )
                raise ScheduleError(f"rank {rank}: {action} has no place in {schedule.name}: {why}")
            if done[at] & bits:
                raise ScheduleError(f"rank {rank}: {action} comes a second time")
            for needed, where in needs[stage][kind]:
                if not done[where * microbatches + microbatch] & _BITS[needed]:
                    missing = Action(needed, where, microbatch)
                    raise ScheduleError(f"rank {rank}: {action} comes before {missing}, which it needs")
            done[at] |= bits
    for stage, todo in enumerate(needs):
        parts = [kind for kind in todo if kind is not Kind.BACKWARD]
        whole = sum(_BITS[kind] for kind in parts)
        for microbatch in range(microbatches):
            got = done[stage * microbatches + microbatch]
            if got != whole:
                missing = (str(Action(kind, stage, microbatch)) for kind in parts if not got & _BITS[kind])
                raise ScheduleError(
                    f"rank {schedule.stage_rank[stage]}: nowhere does {', '.join(missing)} (B is I and W in one)"
                )


def _check_links(schedule: Schedule) -> None:
    owner, microbatches = schedule.stage_rank, schedule.microbatches
    due: dict[Link, list[int]] = defaultdict(list)  # receives as numbers, in the order of their sends
    received: dict[Link, list[int]] = defaultdict(list)

    def number(forward: bool, stage: int, microbatch: int) -> int:
        return (stage * microbatches + microbatch) * 2 + forward

    for rank, actions in enumerate(schedule.actions):
        for kind, stage, microbatch in actions:
            if kind is Kind.SEND_FORWARD:
                due[rank, owner[stage + 1]].append(number(True, stage + 1, microbatch))
            elif kind is Kind.SEND_BACKWARD:
                due[rank, owner[stage - 1]].append(number(False, stage - 1, microbatch))
            elif kind is Kind.RECEIVE_FORWARD:
                received[owner[stage - 1], rank].append(number(True, stage, microbatch))
            elif kind is Kind.RECEIVE_BACKWARD:
                received[owner[stage + 1], rank].append(number(False, stage, microbatch))

    def receive(number: int) -> Action:
        stage, microbatch = divmod(number // 2, microbatches)
        return Action(Kind.RECEIVE_FORWARD if number % 2 else Kind.RECEIVE_BACKWARD, stage, microbatch)

    for (sender, receiver), numbers in due.items():
        if numbers != received[sender, receiver]:
            wanted, got = next(
                pair for pair in zip(numbers, received[sender, receiver], strict=True) if pair[0] != pair[1]
            )
            raise ScheduleError(
                f"rank {receiver}: {receive(got)} comes where rank {sender} does {receive(wanted).other_end}; "
                "receives must be in the order of the sends"
            )


def _check_progress(schedule: Schedule, *, rendezvous: bool) -> None:
    """Let each rank go as far as it can, until all are done or all wait."""
    owner, ahead = schedule.stage_rank, schedule.lookahead > 0
    sent: dict[Channel, int] = defaultdict(int)
    posted: dict[Channel, int] = defaultdict(int)
    messages = 0  # sent or posted so far

    def go(rank: int) -> Iterator[tuple[int, Action]]:
        """Do the rank's actions; where it has to wait, say for which rank and at which action, until it needn't."""
        nonlocal messages
        number: dict[Action, int] = {}  # which message of its channel a posted receive is for
        for action in schedule.actions[rank]:
            kind, stage, _ = action
            if kind is Kind.SEND_FORWARD or kind is Kind.SEND_BACKWARD:
                forward = kind is Kind.SEND_FORWARD
                peer = owner[stage + 1 if forward else stage - 1]
                channel = (rank, peer, forward)
                while rendezvous and posted[channel] < sent[channel]:
                    yield peer, action
                sent[channel] += 1
                messages += 1
                continue
            receive = action if kind in RECEIVES else receive_for(action, owner) if ahead else None
            if receive is None:
                continue
            forward = receive.kind is Kind.RECEIVE_FORWARD
            peer = owner[stage - 1 if forward else stage + 1]
            channel = (peer, rank, forward)
            if receive is action:
                posted[channel] += 1
                messages += 1
                if ahead:
                    number[receive] = posted[channel]
                    continue
            due = number.pop(receive) if ahead else posted[channel]
            while sent[channel] < due:
                yield peer, action

    ranks = [go(rank) for rank in range(schedule.degree)]
    runnable = deque(range(schedule.degree))
    waits: dict[int, tuple[int, Action]] = {}
    while runnable:
        rank = runnable.popleft()
        before = messages
        stop = next(ranks[rank], None)
        if stop is not None:
            waits[rank] = stop
        if messages > before:
            for sleeper in [
                sleeper for sleeper, (peer, _) in waits.items() if peer == rank and sleeper != rank
            ]:
                del waits[sleeper]
                runnable.append(sleeper)
    if waits:
        how = "rendezvous" if rendezvous else "buffered"
        each = (
            f"rank {rank} waits at {action} for rank {peer}" for rank, (peer, action) in sorted(waits.items())
        )
        raise ScheduleError(f"{schedule.name}: deadlock with {how} sends: {'; '.join(each)}")
