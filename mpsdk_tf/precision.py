"""Mixed precision: computing in bf16 or fp16 over fp32 weights, gradients reduced in fp32, and the fp16 loss scale."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import keras
import tensorflow as tf

from mpsdk.config import Precision
from mpsdk_tf.tensor import Tensor

COMPUTE_DTYPES = {"fp32": tf.float32, "bf16": tf.bfloat16, "fp16": tf.float16}


@contextmanager
def layers_of(dtype: tf.DType) -> Iterator[None]:
    """Within, Keras layers are made for weights and inputs of `dtype`, and hold none of their own."""
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(dtype.name)
    try:
        with keras.StatelessScope(initialize_variables=False):
            yield
    finally:
        keras.config.set_dtype_policy(before)


class LossScale:
    """Dynamic loss scaling for fp16 (Micikevicius et al. 2018, arXiv:1710.03740, section 3.2), all on the device.

    A step whose gradients overflowed is skipped and the scale halved; after `interval` good steps in a row the scale is
    doubled. With other precisions the scale is 1 and stays.
    """

    def __init__(self, precision: Precision) -> None:
        self.active = precision.mode == "fp16"
        self.interval = precision.loss_scale_growth_interval
        start = precision.initial_loss_scale if self.active else 1.0
        self.scale = tf.Variable(tf.constant(start, tf.float32), trainable=False)
        self.good_steps = tf.Variable(tf.constant(0), trainable=False)

    def update(self, overflowed: Tensor) -> None:
        """Take note of a step; `overflowed` is a boolean scalar, equal on all ranks."""
        good = tf.where(overflowed, 0, self.good_steps + 1)
        grow = good >= self.interval
        factor = tf.where(overflowed, 0.5, tf.where(grow, 2.0, 1.0))
        self.scale.assign(self.scale * factor)
        self.good_steps.assign(tf.where(grow, 0, good))
