"""One pipeline stage: its pieces in order, each over the weights that it computes with."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import tensorflow as tf

from mpsdk_tf.dropout import Moment, Site, seeds_at
from mpsdk_tf.graph import Piece, Saved
from mpsdk_tf.sharded import Unit, Whole
from mpsdk_tf.tensor import Tensor

Extras = Callable[[int], list[Tensor]]
"""A microbatch's number, to what a part takes beside its input: labels, seeds."""


class Feed:
    """What the parts of a stage take beside their input, for the microbatches of the pass that is being traced.

    `arrays`: the batch's, by name, each a function of a microbatch's number.
    """

    def __init__(self) -> None:
        self.arrays: dict[str, Callable[[int], Tensor]] = {}
        self.moment: Callable[[int], Moment] | None = None

    def of(self, names: Sequence[str], sites: Sequence[Site] = ()) -> Extras:
        """The seeds of `sites`, if there are any, then the batch's arrays called `names`."""

        def extras(microbatch: int) -> list[Tensor]:
            found = [self.arrays[name](microbatch) for name in names]
            if not sites:
                return found
            assert self.moment is not None
            return [seeds_at(self.moment(microbatch), sites), *found]

        return extras


@dataclass(frozen=True)
class Part:
    """A piece, the number of the unit whose weights it computes with, and their names.

    `stays`: whether the weights stay whole from its forward until its backward, where they could be let go.
    `offloads`: whether its input waits for the backward in the CPU's memory.
    """

    piece: Piece
    unit: int
    names: tuple[str, ...]
    extras: Extras = lambda microbatch: []
    stays: bool = False
    offloads: bool = False

    def of(self, whole: Whole) -> list[Tensor]:
        return [whole[name] for name in self.names]


@dataclass
class InFlight:
    """What one microbatch has left at a stage.

    `whole`: weights that stay. `gradients`: of a unit, as far as they are made; `left`: by how many backwards they are yet
    to be added to.
    """

    saved: list[Saved] = field(default_factory=list)
    whole: dict[int, Whole] = field(default_factory=dict)
    gradients: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    left: Counter[int] = field(default_factory=Counter)


Complete = Callable[[int, dict[str, Tensor]], None]
"""Told the number of a unit and its whole gradients, when a microbatch's backwards have made all of them."""


class Stage:
    """Args:
    parts: for training, in the order of the forward.
    quiet: the same without dropout, for evaluation.
    takes, gives: what travels from the stage before, and to the stage after; None where there is none.
    lets_go: whether weights are gathered for each part and let go after it; else they are whole for all of a step.
    prefetch: how many parts ahead weights are gathered.
    device: that this rank works on.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        quiet: Sequence[Part],
        units: Sequence[Unit],
        *,
        takes: tf.TensorSpec | None,
        gives: tf.TensorSpec | None,
        lets_go: bool,
        prefetch: int,
        device: str,
    ) -> None:
        self.parts, self.quiet, self.units = parts, quiet, units
        self.takes, self.gives = takes, gives
        self._lets_go, self._prefetch, self._device = lets_go, prefetch, device
        self._held: dict[int, Whole] = {}

    def begin(self) -> None:
        """At the start of a step's program: gather what stays whole for all of it."""
        self._held = {} if self._lets_go else {number: unit.whole() for number, unit in enumerate(self.units)}

    def forward(self, hidden: Tensor, microbatch: int) -> tuple[Tensor, InFlight]:
        flight = InFlight()
        whole = dict(self._held)
        for number, part in enumerate(self.parts):
            self._gather(self.parts[number : number + 1 + self._prefetch], whole, after=hidden)
            weights = whole[part.unit]
            if part.stays:
                flight.whole[part.unit] = weights
            hidden, saved = part.piece.forward(part.of(weights), hidden, part.extras(microbatch))
            if part.offloads:
                saved.move_input(self._device.replace("GPU", "CPU"))
            flight.saved.append(saved)
            flight.left[part.unit] += part.piece.backwards
            if self._lets_go and not part.stays and not _used_later(self.parts, number):
                whole.pop(part.unit)
        return hidden, flight

    def evaluate(self, hidden: Tensor, microbatch: int) -> Tensor:
        whole = dict(self._held)
        for number, part in enumerate(self.quiet):
            self._gather(self.quiet[number : number + 1 + self._prefetch], whole, after=hidden)
            hidden, _ = part.piece.forward(part.of(whole[part.unit]), hidden, part.extras(microbatch))
            if self._lets_go and not _used_later(self.quiet, number):
                whole.pop(part.unit)
        return hidden

    def backward(self, flight: InFlight, gradient: Tensor, complete: Complete) -> Tensor | None:
        """The gradient of the input; None where that has none. A split backward leaves weight gradients for later."""
        whole = self._held | flight.whole
        backwards = list(reversed(list(zip(self.parts, flight.saved, strict=True))))
        hidden: Tensor | None = gradient
        for number, (part, saved) in enumerate(backwards):
            assert hidden is not None
            ahead = [each for each, _ in backwards[number : number + 1 + self._prefetch]]
            self._gather([each for each in ahead if each.piece.reads_parameters], whole, after=hidden)
            weights = part.of(whole[part.unit]) if part.piece.reads_parameters else None
            if part.offloads:
                with tf.control_dependencies([hidden]):
                    saved.move_input(self._device)
            hidden, gradients = part.piece.backward(saved, weights, hidden)
            self._collect(flight, part, gradients, complete)
            if self._lets_go and not part.stays:
                whole.pop(part.unit, None)
        return hidden

    def backward_weights(self, flight: InFlight, complete: Complete) -> None:
        """The second part of a split backward."""
        for part, saved in reversed(list(zip(self.parts, flight.saved, strict=True))):
            if saved.deferred:
                self._collect(flight, part, part.piece.backward_weights(saved).parameters, complete)

    def _gather(self, parts: Sequence[Part], whole: dict[int, Whole], *, after: Tensor) -> None:
        for part in parts:
            if part.unit not in whole:
                with tf.control_dependencies([after]):
                    whole[part.unit] = self.units[part.unit].whole()

    def _collect(
        self, flight: InFlight, part: Part, gradients: Sequence[Tensor | None], complete: Complete
    ) -> None:
        found = flight.gradients.setdefault(part.unit, {})
        for name, gradient in zip(part.names, gradients, strict=True):
            if gradient is not None and name in found:  # a tied tensor
                found[name] = tf.cast(found[name], tf.float32) + tf.cast(gradient, tf.float32)
            elif gradient is not None:
                found[name] = gradient
        flight.left[part.unit] -= 1
        if flight.left[part.unit] == 0:
            complete(part.unit, flight.gradients.pop(part.unit))


def _used_later(parts: Sequence[Part], number: int) -> bool:
    """Whether a part after part `number` computes with the same weights."""
    return parts[number].unit in {later.unit for later in parts[number + 1 :]}
