"""Which tokens a token attends to: those before it, those near it, those that are not padding."""

from __future__ import annotations

import tensorflow as tf

from mpsdk.families.spec import TransformerSpec
from mpsdk_tf.tensor import Tensor


def reach(
    spec: TransformerSpec, window: int | None, length: int | Tensor, attention_mask: Tensor | None
) -> Tensor | None:
    """(batch or 1, 1, length, length), true where a query attends to a key; None: everywhere.

    `attention_mask`: (batch, length), 0 where a row is padded, left or right; None: nowhere. Before left padding there may be
    nothing but padding: there a token reaches itself, so that its state, which nobody reads, is a number.
    """
    near = None
    if spec.causal or window is not None:
        back = (
            -1 if window is None else tf.minimum(window - 1, length)
        )  # a window may be wider than there are tokens
        everywhere = tf.ones((length, length), tf.bool)
        near = tf.linalg.band_part(everywhere, back, 0 if spec.causal else back)[tf.newaxis, tf.newaxis]
    if attention_mask is None:
        return near
    valid = tf.cast(attention_mask, tf.bool)[:, tf.newaxis, tf.newaxis, :]
    if near is None:
        return valid
    return (near & valid) | tf.eye(length, dtype=tf.bool)


def pooled_index(
    spec: TransformerSpec, attention_mask: Tensor | None, length: int | Tensor, batch: int | Tensor
) -> Tensor:
    """(batch,): where the token stands whose state is its sequence's: the first, or the last that is not padding."""
    if spec.head.pooled == "first":
        return tf.zeros((batch,), tf.int32)
    if attention_mask is None:
        return tf.fill((batch,), tf.cast(length - 1, tf.int32))
    places = tf.cast(attention_mask, tf.int32) * tf.range(length)
    return tf.argmax(places, axis=-1, output_type=tf.int32)
