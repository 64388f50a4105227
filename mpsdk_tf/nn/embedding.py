"""Token embedding and output projection, cut by rows of the vocabulary."""

from __future__ import annotations

from collections.abc import Callable

import keras
import tensorflow as tf

from mpsdk_tf.comm import TensorGroup, enter_parallel, leave_parallel
from mpsdk_tf.nn.linear import linear
from mpsdk_tf.tensor import Tensor


class DistributedEmbedding(keras.layers.Layer):
    """Rows [rank * n, (rank + 1) * n) of an embedding of `size * n` rows.

    A token outside this rank's rows contributes zeros, and the sum over the group is the lookup.
    Shapes: ids (batch, length) -> (batch, length, width), or this rank's part of the sequence under sequence parallelism.
    """

    def __init__(self, rows: int, width: int, *, group: TensorGroup) -> None:
        super().__init__(autocast=False)
        self.group = group
        self.weight = self.add_weight(name="weight", shape=(rows // group.size, width), initializer="zeros")
        self.built = True

    def call(self, ids: Tensor) -> Tensor:
        weight: Tensor = tf.convert_to_tensor(self.weight)
        if self.group.handle is None:
            return lookup(weight, ids)
        local = ids - self.group.rank * weight.shape[0]
        outside = (local < 0) | (local >= weight.shape[0])
        found = lookup(weight, tf.where(outside, 0, local))
        inside = tf.cast(~outside, found.dtype)
        return leave_parallel(found * inside[..., tf.newaxis], self.group)


def lookup(table: Tensor, ids: Tensor) -> Tensor:
    """Rows `ids` of `table`. The gradient is dense, and needs no table."""

    @tf.custom_gradient
    def call(table: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        def backward(gradient: Tensor) -> Tensor:
            rows = tf.reshape(gradient, (-1, table.shape[1]))
            return tf.math.unsorted_segment_sum(rows, tf.reshape(ids, (-1,)), table.shape[0])

        return tf.gather(table, ids), backward

    return call(table)


class DistributedOutput(keras.layers.Layer):
    """The output projection: logits over this rank's rows of the vocabulary.

    `weight` is None when tied to an embedding on the same rank, whose weight `call` is then given; `bias`, of this rank's
    rows, is the projection's own.
    Shapes: (batch, length, width), or this rank's part of the sequence -> (batch, length, rows / t).
    """

    def __init__(
        self, rows: int, width: int, *, group: TensorGroup, tied: bool = False, bias: bool = False
    ) -> None:
        super().__init__(autocast=False)
        self.group = group
        self.weight = (
            None
            if tied
            else self.add_weight(name="weight", shape=(rows // group.size, width), initializer="zeros")
        )
        self.bias = (
            self.add_weight(name="bias", shape=(rows // group.size,), initializer="zeros") if bias else None
        )
        self.built = True

    def call(self, hidden: Tensor, tied_weight: Tensor | None = None) -> Tensor:
        weight = self.weight if tied_weight is None else tied_weight
        assert weight is not None
        logits = linear(enter_parallel(hidden, self.group), weight)
        return logits if self.bias is None else tf.nn.bias_add(logits, tf.convert_to_tensor(self.bias))
