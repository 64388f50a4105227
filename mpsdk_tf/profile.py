"""Measures one step of a rank: a trace of its operations, and when each action of the schedule began and ended.

A step is one program, in which nothing can be measured from outside. But its operations carry the names of the actions and
phases that they belong to (`scope`), always, so that it is the same program with and without; and TensorFlow's profiler
says when each of them ran.

| span                         | from                                            | to                                |
|------------------------------|-------------------------------------------------|-----------------------------------|
| an action that computes      | its first operation, and its wait is over       | its last operation is done        |
| `wait`, before that          | the action before it is done                    | the message is there              |
| a send, a receive            | it is posted                                    | the message has gone, or come     |
| `token count`                | its first operation                             | its last operation is done        |
| the other phases             | the rank has done what stands before            | their last operation is done      |

Messages and the count of tokens go on beside the actions; all else of a rank comes one after another.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import tensorflow as tf

from mpsdk.backend import Place
from mpsdk.plan import Plan
from mpsdk.profile import (
    PROGRAM,
    REDUCTION,
    SENDS,
    TOKEN_COUNT,
    UPDATE,
    WAIT,
    MeasuredSpan,
    RankSpans,
    compress_if_large,
    machine,
    trace_path,
)
from mpsdk.schedule import COMPUTE, RECEIVES, Action, Kind
from mpsdk.schedule import SENDS as SEND_KINDS
from mpsdk_tf.comm import all_reduce, deadline
from mpsdk_tf.compiled import compiles_step
from mpsdk_tf.topology import Groups
from mpsdk_tf.xplane import Event, Operation, operation_of, operations, read_events

_MET = "ranks met"  # an event of the trace: where its clock and the machine's are read together
_BOOKKEEPING = ("ThreadpoolListener::", "ExecutorState::", "ExecutorDoneCallback")
_PHASES = (TOKEN_COUNT, REDUCTION, UPDATE)
_MESSAGES = SEND_KINDS | RECEIVES
_BROUGHT_BY = {  # what an action computes with, where another rank sends it
    Kind.FORWARD: Kind.RECEIVE_FORWARD,
    Kind.BACKWARD: Kind.RECEIVE_BACKWARD,
    Kind.BACKWARD_INPUT: Kind.RECEIVE_BACKWARD,
}
_MICROSECONDS = 1e6


def scope(of: Action | str) -> AbstractContextManager[Any]:
    """Operations made in it carry the name of an action or of a phase."""
    return tf.name_scope(_name(of))


def _name(of: Action | str) -> str:
    return str(of).replace(" ", "_")


@contextmanager
def measured(directory: Path | None, plan: Plan, place: Place, groups: Groups) -> Generator[None]:
    """Around a step: trace it, and write what was measured to `directory`; None: only meet the other ranks."""
    if directory is None:
        _meet(place, groups)
        yield
        return
    with tempfile.TemporaryDirectory(prefix="mpsdk-profile-") as left:
        tf.profiler.experimental.start(left, tf.profiler.experimental.ProfilerOptions(python_tracer_level=0))
        saved = False
        try:
            _meet(place, groups)
            met = time.perf_counter()
            with tf.profiler.experimental.Trace(_MET):
                pass
            yield
            tf.test.experimental.sync_devices()
            saved = True
        finally:
            tf.profiler.experimental.stop(save=saved)
        events = _from(met, read_events(Path(left)))
    ranges = ranges_of(plan, place.rank, operations(events))
    path = trace_path(directory, place.rank)
    path.write_text(json.dumps({"traceEvents": list(_trace(place.rank, events, ranges))}), encoding="utf-8")
    compress_if_large(path)
    spans = tuple(each.span for each in ranges)
    RankSpans(rank=place.rank, machine=machine(), met=met, spans=spans).save(directory)


def _meet(place: Place, groups: Groups) -> None:
    """Leave together with the other ranks, and with nothing left to do."""
    with tf.device(groups.device), deadline(place.timeout, place.rank, "starting the profile"):
        all_reduce(tf.zeros(()), groups.world).numpy()
    tf.test.experimental.sync_devices()


def _from(met: float, events: Sequence[Event]) -> list[Event]:
    """The events since the ranks met, in seconds of the machine's clock."""
    zero = next(event.start for event in events if event.name == _MET)
    shift = met - zero
    return [
        event._replace(start=event.start + shift, end=event.end + shift)
        for event in events
        if event.start >= zero and event.name != _MET
    ]


# -- the spans -------------------------------------------------------------------------------------------------------


class Range(NamedTuple):
    """A span, and its name in the trace."""

    name: str
    span: MeasuredSpan


def ranges_of(plan: Plan, rank: int, ran: Sequence[Operation]) -> list[Range]:
    """What `rank` did in a step in which the operations `ran` ran, in the order in which it ended."""
    if compiles_step(plan):  # nothing in it can be told apart
        start, end = ran[0].start, max(operation.end for operation in ran)
        return [Range(PROGRAM, MeasuredSpan(kind=PROGRAM, start=start, end=end))]
    actions = plan.actions(rank)
    received = {action for action in actions if action.kind in RECEIVES}
    found = _extents(ran, {*map(_name, actions), *map(_name, _PHASES)})
    now = min(start for (name, _), (start, _) in found.items() if name not in map(_name, _PHASES))
    ranges: list[Range] = []

    def add(kind: str, start: float, end: float, action: Action | None = None, part: int = 0) -> float:
        """Gives the end, which is not before the start."""
        where: dict[str, Any] = {}
        if action is not None:
            where = {"stage": action.stage, "microbatch": action.microbatch, "part": part}
        name = kind if action is None else f"{WAIT} {action}" if kind == WAIT else str(action)
        span = MeasuredSpan(kind=kind, start=start, end=max(start, end), **where)
        ranges.append(Range(name, span))
        return span.end

    add(TOKEN_COUNT, *found[_name(TOKEN_COUNT), 0])
    for part in range(plan.training.accumulation):
        sent = now
        for action in actions:
            start, end = found.get((_name(action), part), (now, now))
            if action.kind in COMPUTE:
                message = action._replace(kind=_BROUGHT_BY.get(action.kind, action.kind))
                if message in received:
                    now = add(WAIT, now, found[_name(message), part][1], message, part)
                now = add(action.kind, max(now, start), end, action, part)
            else:
                add(action.kind, start, end, action, part)
                sent = max(sent, end) if action.kind in SEND_KINDS else sent
        now = add(SENDS, now, sent)
    for phase in (REDUCTION, UPDATE):
        now = add(phase, now, found.get((_name(phase), 0), (now, now))[1])
    return sorted(ranges, key=lambda each: each.span.end)


def _extents(ran: Iterable[Operation], names: set[str]) -> dict[tuple[str, int], tuple[float, float]]:
    """First start and last end of the operations in each scope, by its name and the number of the pass."""
    found: dict[tuple[str, int], tuple[float, float]] = {}
    for operation in ran:
        for name in names.intersection(operation.name.split("/")):
            start, end = found.get((name, operation.times), (operation.start, operation.end))
            found[name, operation.times] = min(start, operation.start), max(end, operation.end)
    return found


# -- the trace -------------------------------------------------------------------------------------------------------


def _trace(rank: int, events: Iterable[Event], ranges: Iterable[Range]) -> Iterator[dict[str, Any]]:
    """The events of a Chrome trace: the ranges, above what each thread and device ran."""
    shown = [
        (line, each.span.start, each.span.end, {"cat": "user_annotation", "name": each.name})
        for line, each in _in_lines(ranges)
    ]
    shown += [
        (event.line, event.start, event.end, _shown(event))
        for event in events
        if not event.name.startswith(_BOOKKEEPING)
    ]
    lines = {line: number for number, line in enumerate(dict.fromkeys(line for line, *_ in shown))}
    yield {"ph": "M", "pid": rank, "tid": 0, "name": "process_name", "args": {"name": f"rank {rank}"}}
    for line, number in lines.items():
        yield {"ph": "M", "pid": rank, "tid": number, "name": "thread_name", "args": {"name": line}}
    for line, start, end, what in shown:
        when = {"ts": start * _MICROSECONDS, "dur": (end - start) * _MICROSECONDS}
        yield {"ph": "X", "pid": rank, "tid": lines[line], **when, **what}


def _shown(event: Event) -> dict[str, Any]:
    """An operation by its type, as the same one of another block or microbatch has it too; its full name beside that."""
    if event.on_device:
        return {"cat": "kernel", "name": event.name}
    operation = operation_of(event)
    if operation is None:
        return {"cat": "runtime", "name": event.name}
    name, type_ = operation
    return {"cat": "cpu_op", "name": type_, "args": {"operation": name}}


def _in_lines(ranges: Iterable[Range]) -> Iterator[tuple[str, Range]]:
    """Put ranges on lines: on one what comes one after another, on others what goes on beside it, without overlap."""
    in_order = sorted(ranges, key=lambda each: each.span.start)
    beside = [each for each in in_order if each.span.kind in {TOKEN_COUNT, *_MESSAGES}]
    yield from (("actions", each) for each in in_order if each not in beside)
    free: dict[str, float] = {}
    for each in beside:
        ready = (line for line, end in free.items() if end <= each.span.start)
        line = next(ready, f"messages {len(free) + 1}")
        free[line] = each.span.end
        yield line, each
