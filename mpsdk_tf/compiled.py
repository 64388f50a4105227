"""Compilation by XLA: of what ranks compute between the places where they communicate.

XLA on a CPU has no collectives, and on a GPU one group for a program at most, so a program of XLA never has any here.

| where                                | what is compiled                                                       |
|--------------------------------------|------------------------------------------------------------------------|
| one device does all of a step        | the step, as one program, its update included                          |
| no tensor parallelism                | each piece: embedding, block, head with loss, forward and backward      |
| tensor parallelism                   | within a block, its norms and what lies between entering and leaving    |

Blocks of one shape share their programs: weights enter them as arguments. TensorFlow may leave out XLA without a word, so
`verify_compiler` looks whether it was there.
"""

from __future__ import annotations

import tensorflow as tf

from mpsdk.errors import BackendError
from mpsdk.plan import Plan
from mpsdk_tf.tensor import Tensor
from mpsdk_tf.transformer import Transformer


def is_compiled(plan: Plan) -> bool:
    return plan.distribution.compile.enabled is True


def compiles_step(plan: Plan) -> bool:
    """Whether all of a step is one compiled program."""
    return is_compiled(plan) and plan.world_size == 1


def compiles_pieces(plan: Plan) -> bool:
    """Whether pieces are compiled whole: they don't communicate."""
    return is_compiled(plan) and plan.degrees.tp == 1


def compile_islands(stage: Transformer) -> None:
    """Have the blocks of `stage` compile what they compute between two collectives."""
    for block in stage.blocks.values():
        for layer, name in (
            (block.attention, "partial"),
            (block.feed_forward, "partial"),
            (block.attention_norm, "call"),
            (block.feed_forward_norm, "call"),
        ):
            if layer is None:
                continue
            setattr(layer, name, tf.function(getattr(layer, name), autograph=False, jit_compile=True))


def verify_compiler(device: str) -> None:
    """Raises BackendError when XLA doesn't compile for `device`, or is not there."""

    @tf.function(autograph=False, jit_compile=True)
    def probe(tensor: Tensor) -> Tensor:
        return tf.sin(tensor) + 1.0

    try:
        with tf.device(device):
            ones = tf.ones((8,))
            text = probe.experimental_get_compiler_ir(ones)(stage="hlo")
            probe(ones)
    except (tf.errors.OpError, ValueError, TypeError) as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise BackendError(
            f"compile: true doesn't work on this machine ({reason}); this build of TensorFlow has no XLA for {device}. "
            "Set compile: false"
        ) from error
    if "HloModule" not in str(text):
        raise BackendError(f"XLA gave no program for {device}; set compile: false")
