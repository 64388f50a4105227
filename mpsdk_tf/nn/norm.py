"""The two normalisations, over the last dimension. Replicated over a tensor-parallel group."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import keras
import tensorflow as tf

from mpsdk_tf.tensor import Tensor


class Norm(keras.layers.Layer):
    """LayerNorm (with bias) or RMSNorm (Zhang and Sennrich 2019, arXiv:1910.07467). Keeps the shape."""

    def __init__(self, width: int, *, kind: Literal["layernorm", "rmsnorm"], epsilon: float) -> None:
        super().__init__(autocast=False)
        self.kind, self.epsilon = kind, epsilon
        self.weight = self.add_weight(name="weight", shape=(width,), initializer="ones")
        self.bias = (
            self.add_weight(name="bias", shape=(width,), initializer="zeros") if kind == "layernorm" else None
        )
        self.built = True

    def call(self, hidden: Tensor) -> Tensor:
        weight = tf.convert_to_tensor(self.weight)
        if self.bias is None:
            return rms_norm(hidden, weight, self.epsilon)
        return layer_norm(hidden, weight, tf.convert_to_tensor(self.bias), self.epsilon)


def layer_norm(hidden: Tensor, weight: Tensor, bias: Tensor, epsilon: float) -> Tensor:
    """Computed in fp32. The backward keeps the input and two numbers a row, and normalises again."""

    @tf.custom_gradient
    def call(
        hidden: Tensor, weight: Tensor, bias: Tensor
    ) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, ...]]]:
        values = tf.cast(hidden, tf.float32)
        mean = tf.reduce_mean(values, axis=-1, keepdims=True)
        variance = tf.reduce_mean(tf.math.squared_difference(values, mean), axis=-1, keepdims=True)
        scale = tf.math.rsqrt(variance + epsilon)
        result = (values - mean) * scale * tf.cast(weight, tf.float32) + tf.cast(bias, tf.float32)

        def backward(gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            normalised = (tf.cast(hidden, tf.float32) - mean) * scale
            wide = tf.cast(gradient, tf.float32)
            of_normalised = wide * tf.cast(weight, tf.float32)
            along = tf.reduce_mean(of_normalised * normalised, axis=-1, keepdims=True)
            centre = tf.reduce_mean(of_normalised, axis=-1, keepdims=True)
            of_hidden = scale * (of_normalised - centre - normalised * along)
            return (
                tf.cast(of_hidden, hidden.dtype),
                tf.cast(_over_rows(wide * normalised), weight.dtype),
                tf.cast(_over_rows(wide), bias.dtype),
            )

        return tf.cast(result, hidden.dtype), backward

    return call(hidden, weight, bias)


def rms_norm(hidden: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Computed in fp32. The backward keeps the input and one number a row, and normalises again."""

    @tf.custom_gradient
    def call(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, ...]]]:
        values = tf.cast(hidden, tf.float32)
        scale = tf.math.rsqrt(tf.reduce_mean(tf.square(values), axis=-1, keepdims=True) + epsilon)
        result = values * scale * tf.cast(weight, tf.float32)

        def backward(gradient: Tensor) -> tuple[Tensor, Tensor]:
            normalised = tf.cast(hidden, tf.float32) * scale
            wide = tf.cast(gradient, tf.float32)
            of_normalised = wide * tf.cast(weight, tf.float32)
            along = tf.reduce_mean(of_normalised * normalised, axis=-1, keepdims=True)
            of_hidden = scale * (of_normalised - normalised * along)
            return (
                tf.cast(of_hidden, hidden.dtype),
                tf.cast(_over_rows(wide * normalised), weight.dtype),
            )

        return tf.cast(result, hidden.dtype), backward

    return call(hidden, weight)


def _over_rows(tensor: Tensor) -> Tensor:
    return tf.reduce_sum(tensor, axis=list(range(tensor.shape.rank - 1)))
