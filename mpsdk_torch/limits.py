"""What this backend can't do, as data. Imports no framework, so that a plan can be refused without one."""

from __future__ import annotations

from collections.abc import Iterator

from mpsdk.config import Distribution, Training
from mpsdk.description import ModelDescription
from mpsdk.errors import Problem
from mpsdk.families import FAMILIES
from mpsdk.families.spec import TransformerSpec


def limits(distribution: Distribution, training: Training, description: ModelDescription) -> list[Problem]:
    """Everything in the request that the PyTorch backend has no implementation for."""
    problems: list[Problem] = []
    sharded = distribution.sharded_data_parallel
    if sharded.degree > 1 and sharded.prefetch == 0:
        problems.append(
            Problem(
                "sharded_data_parallel.prefetch", 0, "FSDP2 always gathers one block ahead; use 1 or more"
            )
        )
    problems += _compile_limits(distribution, training, description)
    if description.spec is None:
        problems.append(
            Problem(
                "model",
                description.name,
                f"the PyTorch backend trains the model families so far: {', '.join(FAMILIES)}",
            )
        )
    return problems


def _compile_limits(
    distribution: Distribution, training: Training, description: ModelDescription
) -> Iterator[Problem]:
    enabled, recompute = distribution.compile.enabled, distribution.activation_checkpointing
    if enabled == "auto":
        remedy = "the PyTorch backend does not measure yet whether compiling pays; write true or false"
        yield Problem("compile", enabled, remedy)
    if not enabled or recompute.mode != "selective":
        return
    # Which results are kept is decided in a block's one graph; the pieces of a block that is not one graph know nothing of it.
    schedule = distribution.pipeline.schedule
    if schedule in ("zb-h1", "zb-v"):
        reason = f'schedule "{schedule}"'
    elif description.spec is not None and _drops_in_blocks(training, description.spec):
        reason = "dropout"
    else:
        return
    yield Problem(
        "activation_checkpointing.mode",
        recompute.mode,
        f'can\'t be compiled together with {reason}; set mode to "full" or "none", or compile: false',
    )


def _drops_in_blocks(training: Training, spec: TransformerSpec) -> bool:
    stated = training.dropout
    return max(spec.dropout.attention, spec.dropout.residual) > 0 if stated is None else stated > 0
