"""Runs a pipeline schedule, action by action: unrolled into the program of a step. What runs when stands in the plan.

Every stage reads its own part of the integer batch, so only hidden states and their gradients travel. A control dependency
leads from each action that computes to the next, so that TensorFlow runs them in the schedule's order and keeps no more
microbatches than it says. Sends hold nobody up: they are waited for at the end of the pass.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import tensorflow as tf

from mpsdk.schedule import Action, Kind
from mpsdk_tf.comm import StageLinks, receive, send
from mpsdk_tf.profile import scope
from mpsdk_tf.stage import InFlight, Stage
from mpsdk_tf.tensor import Tensor


class Reduction(Protocol):
    """Whoever sums gradients, told of every unit's that a microbatch's backwards have made."""

    def add(self, stage: int, number: int, gradients: Mapping[str, Tensor]) -> list[Tensor]: ...


class Executor:
    """Writes the actions of one rank into the program that is being traced.

    Args:
        stages: this rank's stages by number. The last stage of the model gives a microbatch's loss.
        stage_rank: the pipeline coordinate of every stage.
        reduction: told of gradients.
        note: told each action before it is traced.
    """

    def __init__(
        self,
        stages: Mapping[int, Stage],
        *,
        stage_rank: Sequence[int],
        links: StageLinks | None,
        reduction: Reduction,
        note: Callable[[str], None],
    ) -> None:
        self.stages, self.links = stages, links
        self.stage_rank, self.last_stage = stage_rank, len(stage_rank) - 1
        self.reduction, self.note = reduction, note

    def run(
        self, actions: Sequence[Action], inputs: Callable[[int], Tensor], seed_gradient: Tensor
    ) -> Tensor:
        """A pass of a training schedule. Gives the sum of the losses of the last stage, zero elsewhere.

        Args:
            inputs: a microbatch's number, to the first stage's input.
            seed_gradient: of the step's loss, with respect to that sum.
        """
        return self._run(actions, _Pass(self, inputs, seed_gradient))

    def evaluate(
        self, actions: Sequence[Action], inputs: Callable[[int], Tensor], shape: Sequence[int] = ()
    ) -> Tensor:
        """A forward-only schedule. Gives the sum of what the last stage gives, of this shape, zero elsewhere."""
        return self._run(actions, _Pass(self, inputs, None), shape)

    def _run(self, actions: Sequence[Action], pass_: _Pass, shape: Sequence[int] = ()) -> Tensor:
        for action in actions:
            self.note(f"tracing {action}")
            pass_.do(action)
        return pass_.finish(shape)


class _Pass:
    """What is in flight during one run of a schedule, by (stage, microbatch)."""

    def __init__(
        self, executor: Executor, inputs: Callable[[int], Tensor], seed_gradient: Tensor | None
    ) -> None:
        self._executor, self._read, self._seed_gradient = executor, inputs, seed_gradient
        self._inputs: dict[tuple[int, int], Tensor] = {}  # received
        self._outputs: dict[tuple[int, int], Tensor] = {}  # to be sent, or for the next stage on this rank
        self._flights: dict[tuple[int, int], InFlight] = {}
        self._gradients: dict[tuple[int, int], Tensor] = {}  # of a stage's output, received or made here
        self._losses: list[Tensor] = []
        self._sends: list[Tensor] = []
        self._before: list[tf.Operation] = []  # what the next action waits for

    def do(self, action: Action) -> None:
        with tf.control_dependencies(self._before), scope(action):
            match action.kind:
                case Kind.FORWARD:
                    self._forward(action.stage, action.microbatch)
                case Kind.BACKWARD | Kind.BACKWARD_INPUT:
                    self._backward(action.stage, action.microbatch)
                case Kind.BACKWARD_WEIGHT:
                    self._backward_weight(action.stage, action.microbatch)
                case Kind.SEND_FORWARD | Kind.SEND_BACKWARD:
                    self._send(action)
                case Kind.RECEIVE_FORWARD | Kind.RECEIVE_BACKWARD:
                    self._receive(action)

    def finish(self, shape: Sequence[int]) -> Tensor:
        """Join what has been sent; the sum of the losses."""
        total = tf.add_n(self._losses) if self._losses else tf.zeros(shape, tf.float32)
        with tf.control_dependencies([*self._before, *self._sends]):
            return tf.identity(total)

    def _forward(self, stage: int, microbatch: int) -> None:
        executor, key = self._executor, (stage, microbatch)
        if stage == 0:
            hidden = self._read(microbatch)
        else:  # from a stage on this rank, or received
            before = (stage - 1, microbatch)
            hidden = self._outputs.pop(before) if before in self._outputs else self._inputs.pop(key)
        if self._seed_gradient is None:
            output = executor.stages[stage].evaluate(hidden, microbatch)
        else:
            output, self._flights[key] = executor.stages[stage].forward(hidden, microbatch)
        if stage == executor.last_stage:
            self._losses.append(output)
        else:
            self._outputs[key] = output
        self._then([output])

    def _backward(self, stage: int, microbatch: int) -> None:
        """Whole, or the part that gives the input's gradient: the stage's pieces know which."""
        executor, key = self._executor, (stage, microbatch)
        if stage == executor.last_stage:
            gradient = self._seed_gradient
            assert gradient is not None
        else:
            gradient = self._gradients.pop(key)
        summed: list[Tensor] = []
        of_input = executor.stages[stage].backward(
            self._flights[key], gradient, lambda unit, found: summed.extend(self._add(stage, unit, found))
        )
        if of_input is not None:
            self._gradients[stage - 1, microbatch] = of_input
            summed.append(of_input)
        if not self._flights[key].left.total():
            self._flights.pop(key)
        self._then(summed)

    def _backward_weight(self, stage: int, microbatch: int) -> None:
        summed: list[Tensor] = []
        flight = self._flights.pop((stage, microbatch))
        self._executor.stages[stage].backward_weights(
            flight, lambda unit, found: summed.extend(self._add(stage, unit, found))
        )
        self._then(summed)

    def _add(self, stage: int, unit: int, gradients: dict[str, Tensor]) -> list[Tensor]:
        return self._executor.reduction.add(stage, unit, gradients)

    def _then(self, computed: list[Tensor]) -> None:
        """The next action waits for `computed`."""
        if computed:
            self._before = [tf.group(*computed)]

    def _send(self, action: Action) -> None:
        executor, (kind, stage, microbatch) = self._executor, action
        assert executor.links is not None
        forward = kind is Kind.SEND_FORWARD
        if forward:
            tensor, target = self._outputs.pop((stage, microbatch)), stage + 1
        else:
            tensor, target = self._gradients.pop((stage - 1, microbatch)), stage - 1
        owner = executor.stage_rank
        link = executor.links.link(owner[stage], owner[target], forward=forward)
        self._sends.append(send(tensor, link))

    def _receive(self, action: Action) -> None:
        executor, (kind, stage, microbatch) = self._executor, action
        assert executor.links is not None
        forward = kind is Kind.RECEIVE_FORWARD
        source = stage - 1 if forward else stage + 1
        owner = executor.stage_rank
        link = executor.links.link(owner[source], owner[stage], forward=forward)
        at = executor.stages[stage]
        spec = at.takes if forward else at.gives
        assert spec is not None
        received = receive(spec, link)
        (self._inputs if forward else self._gradients)[(stage, microbatch)] = received
