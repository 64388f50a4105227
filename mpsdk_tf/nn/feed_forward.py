"""The feed-forward part of a block, its inner width cut over a tensor-parallel group."""

from __future__ import annotations

import math
from collections.abc import Callable

import keras
import tensorflow as tf

from mpsdk.families.spec import TransformerSpec
from mpsdk_tf.comm import TensorGroup, enter_parallel
from mpsdk_tf.nn.linear import DistributedLinear
from mpsdk_tf.tensor import Tensor

Function = Callable[[Tensor], Tensor]

_CUBIC = 0.044715  # Hendrycks and Gimpel 2016, arXiv:1606.08415


def _keeping_the_input(function: Function, derivative: Function) -> Function:
    """`function`, whose backward keeps nothing but its input; TensorFlow's own keeps what it computes on the way."""

    @tf.custom_gradient
    def call(inputs: Tensor) -> tuple[Tensor, Function]:
        return function(inputs), lambda gradient: gradient * derivative(inputs)

    return call


def _gelu_derivative(x: Tensor) -> Tensor:
    density = tf.exp(-0.5 * tf.square(x)) * (1 / math.sqrt(2 * math.pi))
    return 0.5 * (1.0 + tf.math.erf(x * math.sqrt(0.5))) + x * density


def _tanh_of_gelu(x: Tensor, squared: Tensor) -> Tensor:
    return tf.tanh(math.sqrt(2 / math.pi) * x * (1.0 + _CUBIC * squared))


def _gelu_tanh(x: Tensor) -> Tensor:
    """TensorFlow's own raises to a power, which takes ten times as long unless a rewriter finds it: in a cluster, none does."""
    return 0.5 * x * (1.0 + _tanh_of_gelu(x, tf.square(x)))


def _gelu_tanh_derivative(x: Tensor) -> Tensor:
    scale = math.sqrt(2 / math.pi)
    squared = tf.square(x)
    tanh = _tanh_of_gelu(x, squared)
    return 0.5 * (1.0 + tanh) + 0.5 * x * (1.0 - tf.square(tanh)) * scale * (1.0 + 3 * _CUBIC * squared)


def _silu_derivative(x: Tensor) -> Tensor:
    sigmoid = tf.sigmoid(x)
    return sigmoid * (1.0 + x * (1.0 - sigmoid))


ACTIVATIONS: dict[str, Function] = {
    "gelu": _keeping_the_input(tf.nn.gelu, _gelu_derivative),
    "gelu_tanh": _keeping_the_input(_gelu_tanh, _gelu_tanh_derivative),
    "relu": tf.nn.relu,
    "silu": _keeping_the_input(lambda x: x * tf.sigmoid(x), _silu_derivative),
}


class FeedForward(keras.layers.Layer):
    """down(activation(up(x))), or down(activation(gate(x)) * up(x)) when gated (Shazeer 2020, arXiv:2002.05202).

    Shape: (batch, length, width) to the same, with this rank's part of the sequence under sequence parallelism.
    """

    def __init__(self, spec: TransformerSpec, group: TensorGroup) -> None:
        super().__init__(autocast=False)
        self.group, self.activation = group, ACTIVATIONS[spec.activation]
        width, inner, bias = spec.hidden_size, spec.feed_forward_size, spec.feed_forward_bias
        self.up = DistributedLinear(width, inner, cut="column", bias=bias, group=group)
        self.gate = (
            DistributedLinear(width, inner, cut="column", bias=bias, group=group) if spec.gated else None
        )
        self.down = DistributedLinear(inner, width, cut="row", bias=bias, group=group)
        self.built = True

    def call(self, hidden: Tensor) -> Tensor:
        return self.down.finish(self.partial(enter_parallel(hidden, self.group)))

    def partial(self, hidden: Tensor) -> Tensor:
        """What this rank computes between the two places where ranks meet."""
        if self.gate is None:
            return self.down.product(self.activation(self.up(hidden)))
        return self.down.product(self.activation(self.gate(hidden)) * self.up(hidden))
