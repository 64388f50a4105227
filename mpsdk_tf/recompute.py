"""Activation checkpointing: what a block keeps from its forward for its backward.

`none` keeps everything that its backward reads; `full` keeps the block's input; `selective` keeps the input and the
results of chosen operations, the dear ones to compute again (Korthikanti et al. 2022, arXiv:2205.05198, section 5, recompute
attention alone instead). What is computed again is what the backward reads, and no more: `mpsdk_tf.graph` cuts it out.
Dropout needs no saved generator state: its masks are functions of where they stand (`mpsdk_tf.dropout`).
"""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from mpsdk.config import ActivationCheckpointing
from mpsdk_tf.graph import Keep
from mpsdk_tf.nn.attention import ATTENTION_RESULT

_MATRIX_PRODUCT = "MatMul"


def repeat_exactly() -> None:
    """Have this process compute the same thing again to the last bit.

    TensorFlow's rewriting of arithmetic depends on which results a function gives, and a forward that is computed again
    gives others than the first.
    """
    tf.config.optimizer.set_experimental_options({"arithmetic_optimization": False})


def keep_of(settings: ActivationCheckpointing) -> Keep | None:
    """What `settings` have the forward of a block keep; None: everything that the backward reads."""
    if settings.mode == "none":
        return None
    kept = settings.keep if settings.mode == "selective" else ()

    def keep(operation: Any) -> bool:
        if "attention" in kept and operation.name.rpartition("/")[2].startswith(ATTENTION_RESULT):
            return True
        return "matmul" in kept and operation.type == _MATRIX_PRODUCT

    return keep
