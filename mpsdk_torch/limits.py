"""What this backend can't do, as data. Imports no framework, so that a plan can be refused without one."""

from __future__ import annotations

from mpsdk.config import Distribution, Training
from mpsdk.description import ModelDescription
from mpsdk.errors import Problem
from mpsdk.families import FAMILIES


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
    if distribution.compile.enabled:
        problems.append(
            Problem(
                "compile",
                distribution.compile.enabled,
                "the PyTorch backend does not compile yet; set compile: false",
            )
        )
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
                f"the PyTorch backend trains the model families so far: {', '.join(FAMILIES)}",
            )
        )
    return problems
