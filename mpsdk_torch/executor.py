"""Runs a pipeline schedule, action by action. What runs when stands in the plan; this room only does it.

Every stage reads its own part of the integer batch, so only hidden states and their gradients travel. A stage's output
is dropped as soon as it is sent: the backward needs only its place in the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from mpsdk.schedule import Action, Kind
from mpsdk_torch.comm import StageLinks

Forward = Callable[[Tensor | None, int], Tensor]
"""A stage: hidden states from the stage before (None at the first) and the microbatch's number, to its output."""

Loss = Callable[[Tensor, int], Tensor]
"""The last stage's output and the microbatch's number, to the scalar to differentiate."""


class Executor:
    """Runs the actions of one rank.

    Args:
        stages: this rank's stages by number.
        stage_rank: the pipeline coordinate of every stage.
        hidden: makes an empty tensor of the shape and dtype that travels between stages.
        before_backward: told (stage, whether it is the last backward of that stage) before each backward.
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
        before_backward: Callable[[int, bool], None],
        note: Callable[[str], None],
    ) -> None:
        self._stages, self._loss, self._links = stages, loss, links
        self._stage_rank, self._last_stage = stage_rank, len(stage_rank) - 1
        self._hidden, self._before_backward, self._note = hidden, before_backward, note

    def run(self, actions: Sequence[Action], *, final: bool = True) -> None:
        """Run a training schedule; `final`: no further pass of this step follows."""
        pass_ = _Pass(self, actions, final=final)
        for action in actions:
            self._note(f"pipeline {action}")
            pass_.do(action)
        self._finish()

    @torch.no_grad()
    def evaluate(self, actions: Sequence[Action]) -> None:
        """Run a forward-only schedule; the loss callable keeps what it wants of the results."""
        pass_ = _Pass(self, actions, final=False)
        for action in actions:
            self._note(f"pipeline {action}, evaluating")
            pass_.do(action)
        self._finish()

    def _finish(self) -> None:
        if self._links is not None:
            self._links.finish()

    def _tag(self, stage: int, microbatch: int) -> int:
        return microbatch * len(self._stage_rank) + stage


class _Pass:
    """What is in flight during one run of a schedule, by (stage, microbatch)."""

    def __init__(self, executor: Executor, actions: Sequence[Action], *, final: bool) -> None:
        self._executor = executor
        self._inputs: dict[tuple[int, int], Tensor] = {}
        self._outputs: dict[
            tuple[int, int], Tensor
        ] = {}  # waiting to be sent, or for the next stage on this rank
        self._edges: dict[tuple[int, int], GradientEdge] = {}
        self._gradients: dict[tuple[int, int], Tensor] = {}  # of a stage's output, received
        self._arriving: dict[tuple[Kind, int, int], dist.Work | None] = {}
        self._backwards_left = _count(actions, Kind.BACKWARD) if final else {}

    def do(self, action: Action) -> None:
        match action.kind:
            case Kind.FORWARD:
                self._forward(action.stage, action.microbatch)
            case Kind.BACKWARD:
                self._backward(action.stage, action.microbatch)
            case Kind.SEND_FORWARD | Kind.SEND_BACKWARD:
                self._send(action)
            case Kind.RECEIVE_FORWARD | Kind.RECEIVE_BACKWARD:
                self._receive(action)
            case _:
                raise NotImplementedError(
                    f"action {action} splits the backward, which this executor does not do yet"
                )

    def _forward(self, stage: int, microbatch: int) -> None:
        key = (stage, microbatch)
        hidden = self._take_input(stage, microbatch)
        output = self._executor._stages[stage](hidden, microbatch)
        if stage == self._executor._last_stage:
            output = self._executor._loss(output, microbatch)
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
        key = (stage, microbatch)
        gradient = None
        if stage != self._executor._last_stage:
            if key not in self._gradients:
                raise RuntimeError(f"no gradient for the output of stage {stage}, microbatch {microbatch}")
            self._wait(Kind.RECEIVE_BACKWARD, stage, microbatch)
            gradient = self._gradients.pop(key)
        self._executor._before_backward(stage, self._is_last_backward(stage))
        torch.autograd.backward((self._edges.pop(key),), None if gradient is None else (gradient,))
        hidden = self._inputs.pop(key, None)
        if hidden is not None:
            assert hidden.grad is not None
            self._gradients[(stage - 1, microbatch)] = hidden.grad

    def _is_last_backward(self, stage: int) -> bool:
        if stage not in self._backwards_left:
            return False
        self._backwards_left[stage] -= 1
        return self._backwards_left[stage] == 0

    def _send(self, action: Action) -> None:
        executor, (kind, stage, microbatch) = self._executor, action
        assert executor._links is not None
        forward = kind is Kind.SEND_FORWARD
        if forward:
            tensor, target = self._outputs.pop((stage, microbatch)), stage + 1
        else:
            tensor, target = self._gradients.pop((stage - 1, microbatch)), stage - 1
        owner, tag = executor._stage_rank, executor._tag(stage, microbatch)
        executor._links.send(tensor, owner[stage], owner[target], forward=forward, tag=tag)

    def _receive(self, action: Action) -> None:
        executor, (kind, stage, microbatch) = self._executor, action
        assert executor._links is not None
        forward = kind is Kind.RECEIVE_FORWARD
        source = stage - 1 if forward else stage + 1
        into = executor._hidden()
        (self._inputs if forward else self._gradients)[(stage, microbatch)] = into
        owner, tag = executor._stage_rank, executor._tag(source, microbatch)
        self._arriving[kind, stage, microbatch] = executor._links.receive(
            into, owner[source], owner[stage], forward=forward, tag=tag
        )

    def _wait(self, kind: Kind, stage: int, microbatch: int) -> None:
        work = self._arriving.pop((kind, stage, microbatch), None)
        if work is not None:
            source = stage - 1 if kind is Kind.RECEIVE_FORWARD else stage + 1
            self._executor._note(f"waiting for microbatch {microbatch} of stage {source}")
            work.wait()


def _count(actions: Sequence[Action], kind: Kind) -> dict[int, int]:
    counts: dict[int, int] = {}
    for action in actions:
        if action.kind is kind:
            counts[action.stage] = counts.get(action.stage, 0) + 1
    return counts
