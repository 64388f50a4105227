"""Runs a pipeline schedule, action by action. What runs when stands in the plan; this room only does it.

Every stage reads its own part of the integer batch, so only hidden states and their gradients travel. A stage's output
is dropped as soon as it is sent: the backward needs only its place in the graph.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from mpsdk.profile import REDUCTION, SENDS
from mpsdk.schedule import Action, Kind
from mpsdk_torch.comm import StageLinks
from mpsdk_torch.nn.deferred import WeightGradients, deferring

Forward = Callable[[Tensor | None, int], Tensor]
"""A stage: hidden states from the stage before (None at the first) and the microbatch's number, to its output."""

Loss = Callable[[Tensor, int], Tensor]
"""The last stage's output and the microbatch's number, to the scalar to differentiate."""


class Reduction(Protocol):
    """Whoever reduces gradients over data ranks, told of every backward. `last`: the step's last one of that stage."""

    def before_backward(self, stage: int, *, last: bool, complete: bool) -> None:
        """`complete` is False when weight gradients of the same microbatch follow."""
        ...

    def after_weight_gradients(self, stage: int, *, last: bool) -> None: ...

    def finish(self) -> None:
        """Wait for what is still being reduced at the end of a step."""
        ...


class Watch:
    """Told what a step does, while it does it. This one looks away; `mpsdk_torch.profile.Recorder` measures."""

    def action(self, action: Action) -> AbstractContextManager[None]:
        return _UNSEEN

    def waiting(self, kind: Kind, stage: int, microbatch: int) -> AbstractContextManager[None]:
        """For the message that a receive of `kind` at `stage` brings; inside of the action that uses it."""
        return _UNSEEN

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Part of the step outside of its actions."""
        return _UNSEEN


_UNSEEN = nullcontext()  # one for all: nothing is made while nobody looks


class Executor:
    """Runs the actions of one rank.

    Args:
        stages: this rank's stages by number.
        stage_rank: the pipeline coordinate of every stage.
        hidden: makes an empty tensor of the shape and dtype that travels between stages.
        reduction: told of each backward.
        note: told each action before it runs.
    """

    def __init__(
        self,
        stages: Mapping[int, Forward],
        loss: Loss,
        *,
        stage_rank: Sequence[int],
        links: StageLinks | None,
        hidden: Callable[[], Tensor],
        reduction: Reduction,
        note: Callable[[str], None],
    ) -> None:
        self.stages, self.loss, self.links = stages, loss, links
        self.stage_rank, self.last_stage = stage_rank, len(stage_rank) - 1
        self.hidden, self.reduction, self.note = hidden, reduction, note
        self.watch = Watch()

    def run(self, actions: Sequence[Action], *, final: bool = True) -> None:
        """Run a training schedule; `final`: no further pass of this step follows."""
        pass_ = _Pass(self, actions, final=final)
        for action in actions:
            self.note(f"pipeline {action}")
            with self.watch.action(action):
                pass_.do(action)
        with self.watch.phase(SENDS):
            self._finish()
        if final:
            self.note("waiting for gradients of other data ranks")
            with self.watch.phase(REDUCTION):
                self.reduction.finish()

    @torch.no_grad()
    def evaluate(self, actions: Sequence[Action]) -> None:
        """Run a forward-only schedule; the loss callable keeps what it wants of the results."""
        pass_ = _Pass(self, actions, final=False)
        for action in actions:
            self.note(f"pipeline {action}, evaluating")
            pass_.do(action)
        self._finish()

    def _finish(self) -> None:
        if self.links is not None:
            self.links.finish()

    def tag(self, stage: int, microbatch: int) -> int:
        return microbatch * len(self.stage_rank) + stage


class _Pass:
    """What is in flight during one run of a schedule, by (stage, microbatch)."""

    def __init__(self, executor: Executor, actions: Sequence[Action], *, final: bool) -> None:
        self._executor = executor
        self._inputs: dict[tuple[int, int], Tensor] = {}
        self._outputs: dict[tuple[int, int], Tensor] = {}  # to be sent, or for the next stage on this rank
        self._edges: dict[tuple[int, int], GradientEdge] = {}
        self._gradients: dict[tuple[int, int], Tensor] = {}  # of a stage's output, received
        self._arriving: dict[tuple[Kind, int, int], dist.Work | None] = {}
        self._weights: dict[tuple[int, int], WeightGradients] = {}  # put off by a backward of inputs
        complete = (
            action.stage for action in actions if action.kind in (Kind.BACKWARD, Kind.BACKWARD_WEIGHT)
        )
        self._left = Counter(complete) if final else Counter[int]()  # backwards that complete a microbatch

    def do(self, action: Action) -> None:
        match action.kind:
            case Kind.FORWARD:
                self._forward(action.stage, action.microbatch)
            case Kind.BACKWARD:
                self._backward(action.stage, action.microbatch)
            case Kind.BACKWARD_INPUT:
                self._backward_input(action.stage, action.microbatch)
            case Kind.BACKWARD_WEIGHT:
                self._backward_weight(action.stage, action.microbatch)
            case Kind.SEND_FORWARD | Kind.SEND_BACKWARD:
                self._send(action)
            case Kind.RECEIVE_FORWARD | Kind.RECEIVE_BACKWARD:
                self._receive(action)

    def _forward(self, stage: int, microbatch: int) -> None:
        key = (stage, microbatch)
        hidden = self._take_input(stage, microbatch)
        output = self._executor.stages[stage](hidden, microbatch)
        if stage == self._executor.last_stage:
            output = self._executor.loss(output, microbatch)
        else:
            self._outputs[key] = output.detach()
        if output.requires_grad:
            if hidden is not None:
                self._inputs[key] = hidden
            self._edges[key] = get_gradient_edge(output)

    def _take_input(self, stage: int, microbatch: int) -> Tensor | None:
        if stage == 0:
            return None
        before = (stage - 1, microbatch)
        if before in self._outputs:  # the stage before is on this rank
            hidden = self._outputs.pop(before)
        else:
            self._wait(Kind.RECEIVE_FORWARD, stage, microbatch)
            hidden = self._inputs.pop((stage, microbatch))
        return hidden.requires_grad_(torch.is_grad_enabled())

    def _backward(self, stage: int, microbatch: int) -> None:
        last = self._completes_last(stage)
        self._executor.reduction.before_backward(stage, last=last, complete=True)
        self._differentiate(stage, microbatch)

    def _backward_input(self, stage: int, microbatch: int) -> None:
        self._executor.reduction.before_backward(stage, last=False, complete=False)
        with deferring(self._weights.setdefault((stage, microbatch), [])):
            self._differentiate(stage, microbatch)

    def _backward_weight(self, stage: int, microbatch: int) -> None:
        for add_gradient in self._weights.pop((stage, microbatch)):
            add_gradient()
        self._executor.reduction.after_weight_gradients(stage, last=self._completes_last(stage))

    def _differentiate(self, stage: int, microbatch: int) -> None:
        key = (stage, microbatch)
        edge = self._edges.pop(key)
        if stage == self._executor.last_stage:
            torch.autograd.backward((edge,))
        else:
            self._wait(Kind.RECEIVE_BACKWARD, stage, microbatch)
            torch.autograd.backward((edge,), (self._gradients.pop(key),))
        hidden = self._inputs.pop(key, None)
        if hidden is not None:
            assert hidden.grad is not None
            self._gradients[(stage - 1, microbatch)] = hidden.grad

    def _completes_last(self, stage: int) -> bool:
        """Note that a microbatch is complete at `stage`; whether it was the step's last one."""
        self._left[stage] -= 1
        return self._left[stage] == 0

    def _send(self, action: Action) -> None:
        executor, (kind, stage, microbatch) = self._executor, action
        assert executor.links is not None
        forward = kind is Kind.SEND_FORWARD
        if forward:
            tensor, target = self._outputs.pop((stage, microbatch)), stage + 1
        else:
            tensor, target = self._gradients.pop((stage - 1, microbatch)), stage - 1
        owner, tag = executor.stage_rank, executor.tag(stage, microbatch)
        executor.links.send(tensor, owner[stage], owner[target], forward=forward, tag=tag)

    def _receive(self, action: Action) -> None:
        executor, (kind, stage, microbatch) = self._executor, action
        assert executor.links is not None
        forward = kind is Kind.RECEIVE_FORWARD
        source = stage - 1 if forward else stage + 1
        into = executor.hidden()
        (self._inputs if forward else self._gradients)[(stage, microbatch)] = into
        owner, tag = executor.stage_rank, executor.tag(source, microbatch)
        self._arriving[kind, stage, microbatch] = executor.links.receive(
            into, owner[source], owner[stage], forward=forward, tag=tag
        )

    def _wait(self, kind: Kind, stage: int, microbatch: int) -> None:
        work = self._arriving.pop((kind, stage, microbatch), None)
        if work is not None:
            source = stage - 1 if kind is Kind.RECEIVE_FORWARD else stage + 1
            self._executor.note(f"waiting for microbatch {microbatch} of stage {source}")
            with self._executor.watch.waiting(kind, stage, microbatch):
                work.wait()
