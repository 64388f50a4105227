"""Cross-entropy over a vocabulary that is cut over a tensor-parallel group. Logits are never gathered."""

from __future__ import annotations

from collections.abc import Callable

import tensorflow as tf

from mpsdk.backend import IGNORED_LABEL
from mpsdk_tf.comm import TensorGroup, all_reduce
from mpsdk_tf.tensor import Tensor


def cross_entropy_sum(logits: Tensor, labels: Tensor, *, vocab_size: int, group: TensorGroup) -> Tensor:
    """Sum of the token losses, in fp32; a label of -100 adds nothing, padding rows of the vocabulary take no part.

    Memory: one fp32 array of the logits' shape is kept for the backward.

    Shapes: logits (batch, length, rows / t) of this rank's rows, labels (batch, length); a scalar, equal on all ranks
    of the group.
    """
    rows = logits.shape[-1]
    first = group.rank * rows
    valid = max(0, min(rows, vocab_size - first))  # a rank may hold padding rows alone
    labels = tf.reshape(labels, (-1,))
    local = labels - first
    here = (local >= 0) & (local < valid)
    index = tf.where(here, local, 0)

    @tf.custom_gradient
    def call(logits: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """loss = log(sum exp(z)) - z_label with the sums over the group; gradient softmax(z) - onehot(label), local.

        Two all-reduces where there is a group: the maximum, then the sum of exponentials together with the label's logit
        (Shoeybi et al. 2019, arXiv:1909.08053, section 3).
        """
        whole = tf.cast(tf.reshape(logits, (-1, rows)), tf.float32)[:, :valid]
        largest = all_reduce(tf.reduce_max(whole, axis=-1), group.handle, "Max")
        centred = whole - largest[:, tf.newaxis]
        exponentials = tf.exp(centred)
        of_label = tf.zeros_like(largest)
        if valid:
            of_label = tf.where(here, tf.gather(centred, index, batch_dims=1), of_label)
        sums = all_reduce(tf.stack([tf.reduce_sum(exponentials, axis=-1), of_label]), group.handle)
        used = tf.cast(labels != IGNORED_LABEL, tf.float32)
        loss = tf.reduce_sum((tf.math.log(sums[0]) - sums[1]) * used)
        factors = used / sums[0]
        own = tf.where(here, used, 0.0)

        def backward(gradient: Tensor) -> Tensor:
            of_whole = exponentials * (factors * gradient)[:, tf.newaxis]
            if valid:
                places = tf.stack([tf.range(index.shape[0]), index], axis=1)
                of_whole = tf.tensor_scatter_nd_sub(of_whole, places, own * gradient)
            padded = tf.pad(of_whole, ((0, 0), (0, rows - valid)))
            return tf.reshape(tf.cast(padded, logits.dtype), logits.shape)

        return loss, backward

    return call(logits)
