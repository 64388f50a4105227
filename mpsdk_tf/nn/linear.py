"""Linear layers whose matrix is cut over a tensor-parallel group.

Column: Y = X W^T + b with W cut by rows into W_1 ... W_t, so that each rank has its own columns of Y.
Row: W cut by columns; each rank has a partial sum of Y, and `leave_parallel` adds them up.
"""

from __future__ import annotations

from typing import Literal

import keras
import tensorflow as tf

from mpsdk_tf.comm import TensorGroup, leave_parallel
from mpsdk_tf.tensor import Tensor


class DistributedLinear(keras.layers.Layer):
    """A linear layer of global size (`in_features`, `out_features`), of which this rank holds one part.

    Args:
        cut: `column` holds (out / t, in) and maps the whole input to this rank's outputs, without communication;
            `row` holds (out, in / t), maps this rank's inputs to the whole output, and sums over the group.

    Shapes: column (batch, length, in) -> (batch, length, out / t); row (batch, length, in / t) -> (batch, length, out),
    or (batch, length / t, out) under sequence parallelism.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        cut: Literal["column", "row"],
        bias: bool,
        group: TensorGroup,
    ) -> None:
        super().__init__(autocast=False)
        self.cut, self.group = cut, group
        size = group.size
        shape = (
            (out_features // size, in_features) if cut == "column" else (out_features, in_features // size)
        )
        self.weight = self.add_weight(name="weight", shape=shape, initializer="zeros")
        self.bias = self.add_weight(name="bias", shape=(shape[0],), initializer="zeros") if bias else None
        self.built = True

    def call(self, inputs: Tensor) -> Tensor:
        return self.finish(self.product(inputs))

    def product(self, inputs: Tensor) -> Tensor:
        """What this rank computes alone: its columns, or its partial sum, without the bias."""
        return linear(inputs, self.weight)

    def finish(self, product: Tensor) -> Tensor:
        """Sum partial sums over the group, and add the bias."""
        if self.cut == "row":
            product = leave_parallel(product, self.group)
        return product if self.bias is None else tf.nn.bias_add(product, tf.convert_to_tensor(self.bias))


def linear(inputs: Tensor, weight: keras.Variable | Tensor) -> Tensor:
    """inputs W^T over the last dimension, as one product of two matrices."""
    matrix = tf.convert_to_tensor(weight)
    *leading, width = sizes(inputs)
    product = tf.matmul(tf.reshape(inputs, (-1, width)), matrix, transpose_b=True)
    return tf.reshape(product, (*leading, matrix.shape[0]))


def sizes(tensor: Tensor) -> list[int | Tensor]:
    """The size of each dimension: a number, or a scalar tensor where it is known only when it runs."""
    return [tf.shape(tensor)[axis] if size is None else size for axis, size in enumerate(tensor.shape)]
