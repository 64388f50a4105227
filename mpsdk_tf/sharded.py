"""Sharded data parallelism, with or without replicas: weights gathered where they are used, gradients reduced.

Between steps a rank holds the fp32 weights of its rows at every level. Units (a block, the embedding, the head) are
gathered and reduced whole, each in one message.

| level        | whole parameters        | gradients reduced   |
|--------------|-------------------------|---------------------|
| `parameters` | one unit at a time      | after each backward |
| `gradients`  | during the step         | after each backward |
| `optimizer`  | during the step         | once a step         |

Replicas are summed once a step at every level. At level `parameters` the last block and the head stay whole until their
backward where that comes directly after the forward: it would gather them again at once. What is gathered ahead waits for
the unit so many places before it, so that no more is whole at a time than `prefetch` says.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import tensorflow as tf

from mpsdk.plan import Plan
from mpsdk_tf.comm import all_gather, all_reduce, reduce_scatter
from mpsdk_tf.parameters import Held
from mpsdk_tf.precision import COMPUTE_DTYPES
from mpsdk_tf.tensor import Tensor
from mpsdk_tf.topology import Groups

Whole = dict[str, Tensor]
"""Whole parameters of a unit, in the compute dtype, by name."""


class Unit:
    """Parameters that are gathered and reduced together."""

    def __init__(self, held: Sequence[Held], plan: Plan, groups: Groups) -> None:
        self.held, self._groups = held, groups
        self._dtype = COMPUTE_DTYPES[plan.distribution.precision.mode]
        self._degree = plan.degrees.sdp
        self._rows = [item.planned.rows(0, self._degree)[1] for item in held]  # of a share, padded

    def whole(self) -> Whole:
        """Every parameter, whole: gathered over the shards."""
        shares = [tf.cast(item.local.read_value(), self._dtype) for item in self.held]
        if self._groups.shards is None:
            return {item.name: share for item, share in zip(self.held, shares, strict=True)}
        padded = [_padded(share, rows) for share, rows in zip(shares, self._rows, strict=True)]
        flat = tf.concat([tf.reshape(share, (-1,)) for share in padded], axis=0)
        table = tf.reshape(all_gather(flat, self._groups.shards), (self._degree, -1))
        columns = tf.split(table, [tensor.shape.num_elements() for tensor in padded], axis=1)
        return {
            item.name: tf.reshape(column, (self._degree * rows, *item.planned.shape[1:]))[
                : item.planned.shape[0]
            ]
            for item, rows, column in zip(self.held, self._rows, columns, strict=True)
        }

    def share(self, gradients: Mapping[str, Tensor]) -> Tensor:
        """This rank's share of whole gradients, summed over the shards, in fp32 and as one flat tensor."""
        ordered = [tf.cast(gradients[item.name], tf.float32) for item in self.held]
        if self._groups.shards is None:
            return tf.concat([tf.reshape(gradient, (-1,)) for gradient in ordered], axis=0)
        table = [
            tf.reshape(_padded(gradient, self._degree * rows), (self._degree, -1))
            for gradient, rows in zip(ordered, self._rows, strict=True)
        ]
        joined = tf.concat(table, axis=1)
        return reduce_scatter(tf.reshape(joined, (-1,)), self._groups.shards)

    def over_replicas(self, share: Tensor) -> Tensor:
        return all_reduce(share, self._groups.replicas)

    def local(self, share: Tensor) -> dict[str, Tensor]:
        """A flat share as the gradients of the parameters held here."""
        shapes = [(rows, *item.planned.shape[1:]) for item, rows in zip(self.held, self._rows, strict=True)]
        sizes = [tf.TensorShape(shape).num_elements() for shape in shapes]
        parts = tf.split(share, sizes)
        return {
            item.name: tf.reshape(part, shape)[: item.local.shape[0]]
            for item, part, shape in zip(self.held, parts, shapes, strict=True)
        }

    @property
    def share_size(self) -> int:
        """Elements of a share as messages carry it."""
        return sum(
            rows * tf.TensorShape(item.planned.shape[1:]).num_elements()
            for item, rows in zip(self.held, self._rows, strict=True)
        )


def _padded(tensor: Tensor, rows: int) -> Tensor:
    missing = rows - tensor.shape[0]
    return tensor if missing == 0 else tf.pad(tensor, ((0, missing), *((0, 0),) * (tensor.shape.rank - 1)))


class ShardedReduction:
    """Sums the gradients of a step: over microbatches, shards and replicas. See `mpsdk_tf.executor.Reduction`.

    A sum is a share of a unit's flat gradient where each backward is reduced, else a whole gradient.
    """

    def __init__(self, units: Mapping[int, Sequence[Unit]], plan: Plan) -> None:
        self._units = units
        sharded = plan.distribution.sharded_data_parallel
        self._each = plan.degrees.sdp > 1 and sharded.level != "optimizer"
        self._joined = plan.data_size > 1
        self._sums: dict[str, Tensor] = {}

    def begin(self, sums: dict[str, Tensor]) -> None:
        """Go on from `sums`, of earlier passes of the step."""
        self._sums = dict(sums)

    @property
    def sums(self) -> dict[str, Tensor]:
        return self._sums

    def zeros(self) -> dict[str, Tensor]:
        """Sums of nothing."""
        zeros: dict[str, Tensor] = {}
        for stage, units in self._units.items():
            for number, unit in enumerate(units):
                if self._each:
                    zeros[f"{stage}.{number}"] = tf.zeros((unit.share_size,), tf.float32)
                else:
                    zeros |= {
                        f"{stage}.{item.name}": tf.zeros(item.planned.shape, tf.float32) for item in unit.held
                    }
        return zeros

    def add(self, stage: int, number: int, gradients: Mapping[str, Tensor]) -> list[Tensor]:
        """Take what a microbatch's backwards have made of unit `number` of `stage`. Gives what has been computed."""
        unit = self._units[stage][number]
        if self._each:
            made = {f"{stage}.{number}": unit.share(gradients)}
        else:
            made = {f"{stage}.{name}": tf.cast(each, tf.float32) for name, each in gradients.items()}
        for name, gradient in made.items():
            self._sums[name] = self._sums[name] + gradient if name in self._sums else gradient
        return [self._sums[name] for name in made]

    def finish(self) -> dict[str, Tensor]:
        """The gradient of every parameter held here, by stage and name, summed over everything."""
        local: dict[str, Tensor] = {}
        for stage, units in self._units.items():
            for number, unit in enumerate(units):
                if self._each:
                    found = unit.local(unit.over_replicas(self._sums[f"{stage}.{number}"]))
                else:
                    found = {item.name: self._sums[f"{stage}.{item.name}"] for item in unit.held}
                    if self._joined:
                        found = unit.local(unit.over_replicas(unit.share(found)))
                local |= found
        return local
