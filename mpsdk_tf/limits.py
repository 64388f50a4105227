"""What this backend can't do, as data. Imports no framework, so that a plan can be refused without one."""

from __future__ import annotations

from collections.abc import Iterator

from mpsdk.config import Distribution, Training
from mpsdk.description import ModelDescription
from mpsdk.errors import Problem
from mpsdk.families import FAMILIES


def limits(distribution: Distribution, training: Training, description: ModelDescription) -> list[Problem]:
    """Everything in the request that the TensorFlow backend has no implementation for."""
    problems = list(_compile_limits(distribution))
    if distribution.checkpoint.asynchronous:
        problems.append(
            Problem(
                "checkpoint.asynchronous",
                True,
                "checkpoints are written synchronously so far; set it to false",
            )
        )
    if description.spec is None:
        problems.append(
            Problem(
                "model",
                description.name,
                f"the TensorFlow backend trains the model families so far: {', '.join(FAMILIES)}",
            )
        )
    return problems


def _compile_limits(distribution: Distribution) -> Iterator[Problem]:
    enabled, recompute = distribution.compile.enabled, distribution.activation_checkpointing
    if enabled == "auto":
        remedy = "the TensorFlow backend does not measure yet whether compiling pays; write true or false"
        yield Problem("compile", enabled, remedy)
    if enabled and recompute.mode == "selective" and distribution.tensor_parallel.degree > 1:
        # Between two collectives all is one program of XLA, which keeps what it likes.
        remedy = 'can\'t be compiled together with tensor_parallel; set mode to "full" or "none", or compile: false'
        yield Problem("activation_checkpointing.mode", recompute.mode, remedy)
