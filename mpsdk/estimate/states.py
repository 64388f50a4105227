"""Elements of parameters, gradients and optimizer moments that each rank holds.

Bytes are 4 an element: weights, reduced gradients and moments are fp32 in every precision.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, NamedTuple

from mpsdk.config import Training
from mpsdk.plan import LocalTensor, Plan, shared_rows

# Tensors of the size of a parameter that an optimizer keeps (Kingma and Ba 2014, arXiv:1412.6980: two moments).
_MOMENTS = {"adamw": 2, "sgd": 1}


def moments(training: Training) -> int:
    """Moments an element of a parameter."""
    if training.optimizer == "sgd" and training.momentum == 0.0:
        return 0
    return _MOMENTS[training.optimizer]


UnitKind = Literal["embedding", "block", "head", "embedding and head"]


@dataclass(frozen=True)
class Unit:
    """Parameters that are gathered and reduced together: a block, the embedding, the head, or the last two when they are
    tied on one stage.

    `shapes`: what a tensor-parallel rank has of each, before sharded data parallelism. `split` says of each whether the ranks
    of a tensor-parallel group each find a part of its gradient, `tied` whether another stage holds a copy.
    """

    kind: UnitKind
    shapes: tuple[tuple[int, ...], ...]
    split: tuple[bool, ...]
    tied: tuple[bool, ...]

    @property
    def elements(self) -> int:
        return sum(map(math.prod, self.shapes))

    def shard(self, sdp: int, degree: int) -> int:
        """Elements at coordinate `sdp` of `degree`."""
        return sum(shard_elements(shape, sdp, degree) for shape in self.shapes)

    def padded(self, degree: int) -> int:
        """Elements of the whole unit as collectives carry it: every share as large as the first."""
        return degree * self.shard(0, degree)


class ShareClass(NamedTuple):
    """The sdp coordinates [start, stop), each of which holds `elements` elements of `tensors` tensors."""

    start: int
    stop: int
    elements: int
    tensors: int


def shard_elements(shape: tuple[int, ...], sdp: int, degree: int) -> int:
    """Elements at coordinate `sdp` of a tensor whose dimension 0 is shared out."""
    start, stop = shared_rows(shape[0], sdp, degree)
    return (stop - start) * math.prod(shape[1:])


def stage_units(plan: Plan, stage: int) -> tuple[Unit, ...]:
    """The units of `stage` in the order of its forward."""
    parallel = plan.distribution.tensor_parallel
    alone = plan.degrees.tp == 1
    return tuple(
        Unit(
            kind=_kind(group),
            shapes=tuple(held.shape for held in group),
            split=tuple(
                not alone and held.tensor.sums_gradient(sequence_parallel=parallel.sequence_parallel)
                for held in group
            ),
            tied=tuple(held.tied for held in group),
        )
        for group in plan.units(stage, 0)
    )


def _kind(group: tuple[LocalTensor, ...]) -> UnitKind:
    parts = {held.tensor.part for held in group}
    return "embedding and head" if len(parts) > 1 else group[0].tensor.part


def share_classes(units: Iterable[Unit], degree: int) -> list[ShareClass]:
    """The sdp coordinates by what they hold, the first coordinates first.

    A tensor's shares change at two coordinates only, where its rows run out, so this takes no loop over the ranks.
    """
    counts = Counter(shape for unit in units for shape in unit.shapes)
    changes = {0}
    for shape in counts:
        full = shape[0] // -(-shape[0] // degree)
        changes |= {full, full + 1}
    starts = sorted(change for change in changes if change < degree)
    classes: list[ShareClass] = []
    before: dict[tuple[int, ...], int] = {}
    for start, stop in pairwise([*starts, degree]):
        shares = {shape: shard_elements(shape, start, degree) for shape in counts}
        if shares == before:
            classes[-1] = classes[-1]._replace(stop=stop)
            continue
        elements = sum(shares[shape] * count for shape, count in counts.items())
        tensors = sum(count for shape, count in counts.items() if shares[shape])
        classes.append(ShareClass(start, stop, elements, tensors))
        before = shares
    return classes
