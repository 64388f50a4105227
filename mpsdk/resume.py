"""Where a run starts: at its first step, or at a checkpoint that fits its model and optimizer.

A checkpoint directory holds one line of training. So `"never"` refuses one that already has checkpoints, and a named
checkpoint refuses one that has newer ones: what a later `"auto"` would find must be what this run wrote. Nothing is
removed for the user.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, cast

from mpsdk.backend import WEIGHT
from mpsdk.checkpoint import Checkpoint, find, latest_verified, step_directory
from mpsdk.checkpoint.fits import tensor_differences
from mpsdk.checkpoint.names import step_of
from mpsdk.checkpoint.problems import refuse
from mpsdk.errors import CheckpointError, ConfigError, Problem
from mpsdk.plan import Plan
from mpsdk.work_order import WorkOrder

AUTO = "auto"
NEVER = "never"


class Start(NamedTuple):
    """Where the loop begins. `step` and `samples_consumed` count what is done already."""

    checkpoint: str | None = None
    step: int = 0
    samples_consumed: int = 0
    own: bool = False  # the checkpoint is one of this run's, not another's
    warnings: tuple[str, ...] = ()  # what was passed over, and why


def find_start(order: WorkOrder) -> Start:
    """Where `order` starts, decided by one rank for all; "auto" reads and verifies the newest checkpoint in full.

    Raises:
        ConfigError: the checkpoint directory holds another line of training.
        CheckpointError: the checkpoint is damaged or doesn't fit the plan, or all of this run's are damaged.
    """
    warnings: list[str] = []
    if order.resume == AUTO:
        checkpoint = latest_verified(order.checkpoints, warnings.append)
        if checkpoint is not None:
            check_fits(checkpoint, order.plan)
    else:
        checkpoint = _named(order)
    if checkpoint is None:
        return Start()
    here = os.path.realpath(step_directory(order.checkpoints, checkpoint.step))
    own = os.path.realpath(checkpoint.path) == here
    return Start(checkpoint.path, checkpoint.step, checkpoint.samples_consumed, own, tuple(warnings))


def expected_checkpoint(order: WorkOrder) -> Checkpoint | None:
    """The checkpoint that `order` will most likely start from, as far as that can be said without reading tensors.

    Raises what `find_start` would, so that the facade can say it before any worker starts.
    """
    if order.resume != AUTO:
        return _named(order)
    for path in find(order.checkpoints):
        with contextlib.suppress(CheckpointError):  # damaged: `find_start` passes it over, and says so
            checkpoint = Checkpoint.open(path)
            break
    else:
        return None
    check_fits(checkpoint, order.plan)
    return checkpoint


def _named(order: WorkOrder) -> Checkpoint | None:
    """The checkpoint at the path that `order.resume` is; None when it is "never"."""
    existing = find(order.checkpoints)
    newest = (step_of(Path(existing[0]).name) or 0) if existing else -1
    if order.resume == NEVER:
        if existing:
            raise _occupied(order, f"holds checkpoints up to step {newest}")
        return None
    checkpoint = Checkpoint.open(order.resume)
    checkpoint.verify(payload=False)  # tensors are verified as they are read
    check_fits(checkpoint, order.plan)
    if order.mode == "train" and newest > checkpoint.step:
        raise _occupied(order, f"holds checkpoints up to step {newest}, newer than step {checkpoint.step}")
    return checkpoint


def check_fits(checkpoint: Checkpoint, plan: Plan) -> None:
    """Raises CheckpointError, listing every difference, when the checkpoint is not one of the plan's model."""
    problems = list(_differences(checkpoint, plan))
    if problems:
        raise refuse(f"checkpoint {checkpoint.path} does not fit this run", problems)


def _differences(checkpoint: Checkpoint, plan: Plan) -> Iterator[str]:
    yield from tensor_differences(checkpoint.shapes(WEIGHT), plan.description)
    training = cast("dict[str, Any]", checkpoint.plan.get("training") or {})
    optimizer = training.get("optimizer")
    if checkpoint.slots - {WEIGHT} and optimizer not in (None, plan.training.optimizer):
        yield f"it holds the state of optimizer {optimizer!r}, and training.optimizer is {plan.training.optimizer!r}"


def _occupied(order: WorkOrder, what: str) -> ConfigError:
    remedy = (
        f"{order.checkpoints} {what}; choose another output_dir, remove that directory, "
        f'or go on from there with resume="auto"'
    )
    return ConfigError([Problem("resume", order.resume, remedy)], where="the run")
