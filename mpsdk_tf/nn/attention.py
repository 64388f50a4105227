"""Self-attention with heads cut over a tensor-parallel group, and grouped-query attention."""

from __future__ import annotations

import math
from collections.abc import Callable

import keras
import numpy as np
import tensorflow as tf

from mpsdk.families.rotary import inverse_frequencies
from mpsdk.families.spec import TransformerSpec
from mpsdk_tf.comm import TensorGroup, enter_parallel
from mpsdk_tf.dropout import any_seed, dropout
from mpsdk_tf.nn.linear import DistributedLinear, sizes
from mpsdk_tf.nn.norm import Norm
from mpsdk_tf.tensor import Tensor

ATTENTION_RESULT = "attention_result"
"""What the results of attention are named in a graph, so that recomputation can keep them."""


class RotaryTable:
    """Cosines and sines of the first positions."""

    def __init__(self, spec: TransformerSpec) -> None:
        assert spec.rotary is not None
        self._interleaved = spec.rotary.interleaved
        self._frequencies = inverse_frequencies(spec)

    def __call__(self, length: int, dtype: tf.DType) -> tuple[Tensor, Tensor]:
        """Two tensors of shape (length, features that turn)."""
        angles = np.outer(np.arange(length, dtype=np.float64), self._frequencies)
        angles = (
            np.repeat(angles, 2, axis=-1) if self._interleaved else np.concatenate([angles, angles], axis=-1)
        )
        return (
            tf.cast(tf.constant(np.cos(angles), tf.float32), dtype),
            tf.cast(tf.constant(np.sin(angles), tf.float32), dtype),
        )


def rotate(heads: Tensor, cosine: Tensor, sine: Tensor, *, interleaved: bool) -> Tensor:
    """Turn the first features of each head by its position, as many as the tables have; the rest stay.

    Pairs are (i, i + d/2), or, `interleaved`, (2 i, 2 i + 1). Shape (batch, heads, length, head size).
    """
    size = cosine.shape[-1]
    turning = heads if size == heads.shape[-1] else heads[..., :size]
    if interleaved:
        pairs = tf.stack([-turning[..., 1::2], turning[..., ::2]], axis=-1)
        partner = tf.reshape(pairs, sizes(turning))
    else:
        first, second = tf.split(turning, 2, axis=-1)
        partner = tf.concat([-second, first], axis=-1)
    turned = turning * cosine + partner * sine
    return turned if size == heads.shape[-1] else tf.concat([turned, heads[..., size:]], axis=-1)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    reach: Tensor | None,
    probability: float = 0.0,
    seed: Tensor | None = None,
    *,
    scale: float | None = None,
) -> Tensor:
    """(batch, heads, length, head size) of queries; keys and values may have fewer heads. Softmax in fp32.

    `reach`: (batch or 1, 1, length, length), true where a query attends to a key; None: everywhere.
    `seed`: of the mask of dropped weights, where `probability` is above 0. `scale`: of scores; None: 1 / sqrt(head size).

    The backward keeps the three inputs and the weights of every pair of tokens, before any is dropped.
    """
    batch, heads, length, size = sizes(query)
    pairs = key.shape[1]
    grouped = (batch, pairs, heads // pairs * length, size)  # queries of one key head under each other
    factor = 1.0 / math.sqrt(size) if scale is None else scale

    def drop(weights: Tensor) -> Tensor:
        return dropout(weights, probability, seed, training=probability > 0.0)

    @tf.custom_gradient
    def call(
        query: Tensor, key: Tensor, value: Tensor
    ) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, ...]]]:
        rows = tf.reshape(query, grouped)
        scores = tf.cast(tf.matmul(rows, key, transpose_b=True), tf.float32) * factor
        if reach is not None:
            scores = _within(scores, reach, heads // pairs)
        weights = tf.cast(tf.nn.softmax(scores, axis=-1), query.dtype)
        mixed = tf.matmul(drop(weights), value)

        def backward(gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            of_mixed = tf.reshape(gradient, grouped)
            of_value = tf.matmul(drop(weights), of_mixed, transpose_a=True)
            # A mask is applied to a gradient as it was to the values.
            of_weights = tf.cast(drop(tf.matmul(of_mixed, value, transpose_b=True)), tf.float32)
            wide = tf.cast(weights, tf.float32)
            centre = tf.reduce_sum(of_weights * wide, axis=-1, keepdims=True)
            of_scores = tf.cast((of_weights - centre) * wide * factor, query.dtype)
            of_query = tf.reshape(tf.matmul(of_scores, key), (batch, heads, length, size))
            of_key = tf.matmul(of_scores, tf.reshape(query, grouped), transpose_a=True)
            return of_query, of_key, of_value

        return tf.reshape(mixed, (batch, heads, length, size)), backward

    return tf.identity(call(query, key, value), name=ATTENTION_RESULT)


def _within(scores: Tensor, reach: Tensor, groups: int) -> Tensor:
    """`scores` of shape (batch, heads, groups * length, length) with what is out of reach put out of the question.

    Chosen, not added: oneDNN takes an addend of four dimensions into the product before it, which is then ten times as slow.
    """
    return tf.where(tf.tile(reach, (1, 1, groups, 1)), scores, scores.dtype.min)


class Attention(keras.layers.Layer):
    """Self-attention. Each rank holds heads / t query heads and key_value_heads / t key and value heads.

    Shape: (batch, length, width) to the same, with this rank's part of the sequence under sequence parallelism.
    """

    def __init__(self, spec: TransformerSpec, group: TensorGroup, rotary: RotaryTable | None) -> None:
        super().__init__(autocast=False)
        self.group, self.rotary, self.head_size = group, rotary, spec.head_size
        self.scale, self.dropout = spec.attention_scale, spec.dropout.attention
        self.interleaved = spec.rotary is not None and spec.rotary.interleaved
        width, queries, pairs = (
            spec.hidden_size,
            spec.heads * spec.head_size,
            spec.key_value_heads * spec.head_size,
        )

        def column(out_features: int) -> DistributedLinear:
            return DistributedLinear(width, out_features, cut="column", bias=spec.attention_bias, group=group)

        self.query, self.key, self.value = column(queries), column(pairs), column(pairs)
        self.query_norm = self.key_norm = None
        if spec.query_key_norm:
            self.query_norm, self.key_norm = (
                Norm(spec.head_size, kind="rmsnorm", epsilon=spec.norm_epsilon) for _ in range(2)
            )
        self.output_projection = DistributedLinear(
            queries, width, cut="row", bias=spec.attention_output_bias, group=group
        )
        self.built = True

    def call(
        self, hidden: Tensor, reach: Tensor | None, seed: Tensor | None = None, training: bool = False
    ) -> Tensor:
        dropped = self.dropout if training else 0.0
        if dropped and seed is None:
            seed = any_seed()
        hidden = enter_parallel(hidden, self.group)
        return self.output_projection.finish(self.partial(hidden, reach, dropped, seed))

    def partial(self, hidden: Tensor, reach: Tensor | None, dropped: float, seed: Tensor | None) -> Tensor:
        """What this rank computes between the two places where ranks meet."""
        query, key, value = self.query(hidden), self.key(hidden), self.value(hidden)
        query, key, value = self._heads(query), self._heads(key), self._heads(value)
        if self.query_norm is not None and self.key_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        if self.rotary is not None:
            cosine, sine = self.rotary(query.shape[2], query.dtype)
            query, key = (rotate(x, cosine, sine, interleaved=self.interleaved) for x in (query, key))
        mixed = attend(query, key, value, reach, dropped, seed, scale=self.scale)
        mixed = tf.transpose(mixed, (0, 2, 1, 3))
        batch, length, heads, size = sizes(mixed)
        return self.output_projection.product(tf.reshape(mixed, (batch, length, heads * size)))

    def _heads(self, projected: Tensor) -> Tensor:
        """(batch, length, n * head size) to (batch, n, length, head size)."""
        batch, length, width = sizes(projected)
        shape = (batch, length, width // self.head_size, self.head_size)
        return tf.transpose(tf.reshape(projected, shape), (0, 2, 1, 3))
