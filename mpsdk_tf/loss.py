"""What a batch's labels say of the logits: cross-entropy over a vocabulary that is cut over a tensor-parallel group, whose
logits are never gathered, or over classes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import tensorflow as tf

from mpsdk.backend import IGNORED_LABEL
from mpsdk_tf.comm import TensorGroup, all_reduce, leave_parallel
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


def class_cross_entropy_sum(
    logits: Tensor, labels: Tensor, *, group: TensorGroup, with_confusion: bool = False
) -> Tensor:
    """Sum of the losses of a classifier, in fp32; a label of -100 adds nothing.

    Shapes: logits (..., classes), labels (...), of which this rank has its own under sequence parallelism (`own_labels`); a
    scalar, equal on all ranks of the group. `with_confusion`: a vector, the scalar and then, row by row, how many of each
    class the logits take for each class.
    """
    classes = logits.shape[-1]
    logits, labels = tf.cast(tf.reshape(logits, (-1, classes)), tf.float32), tf.reshape(labels, (-1,))
    used = tf.cast(labels != IGNORED_LABEL, tf.float32)
    known = tf.where(labels != IGNORED_LABEL, labels, 0)
    losses = tf.nn.sparse_softmax_cross_entropy_with_logits(labels=known, logits=logits)
    total = tf.reduce_sum(losses * used)
    if with_confusion:
        rows = tf.one_hot(known, classes) * used[:, tf.newaxis]
        found = tf.one_hot(tf.argmax(logits, axis=-1), classes)
        counts = tf.matmul(rows, tf.stop_gradient(found), transpose_a=True)
        total = tf.concat([[total], tf.reshape(counts, (-1,))], axis=0)
    return (
        leave_parallel(total, replace(group, sequence_parallel=False)) if group.sequence_parallel else total
    )


def own_labels(labels: Tensor, pooled: Tensor | None, *, length: int, group: TensorGroup) -> Tensor:
    """The labels that this rank's logits are for, under sequence parallelism: of the tokens of its part of the sequence.

    Shapes: labels (batch, length), and this rank's part of them; or (batch,) with `pooled`, (batch,), the tokens that they
    are of: -100 where that lies in another part.
    """
    if not group.sequence_parallel:
        return labels
    part = length // group.size
    start = group.rank * part
    if pooled is None:
        return labels[:, start : start + part]
    return tf.where((pooled >= start) & (pooled < start + part), labels, IGNORED_LABEL)
