"""What the ranks of a case run: a short training under a plan, and what came of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import numpy as np

from mpsdk.backend import WEIGHT, Place, TensorSource
from mpsdk.families import read_model
from mpsdk.families.hf import HuggingFaceSource
from mpsdk.initialise import RandomSource
from mpsdk.plan import Plan
from mpsdk_tf.backend import TensorFlowBackend
from tests import cases
from tests.cases import Outcome

make_plan = partial(cases.make_plan, framework="tensorflow")


def train(
    place: Place,
    plan: Plan,
    steps: int,
    *,
    source: TensorSource | None = None,
    start: int = 0,
    gradients: bool = True,
) -> Outcome:
    """`steps` optimizer steps from `source`, or from the plan's own initial weights."""
    backend = TensorFlowBackend(threads=True)

    def first_update(outcome: Outcome) -> None:
        if gradients:
            _read_first_gradients(backend, plan, outcome)

    return cases.train(backend, place, plan, steps, source=source, start=start, after_first=first_update)


def train_only(place: Place, plan: Plan, steps: int) -> Outcome:
    """`train` without looking at gradients."""
    return train(place, plan, steps, gradients=False)


def train_from_directory(place: Place, plan: Plan, directory: str, steps: int) -> Outcome:
    """`train` from the weights of a Hugging Face directory."""
    read = read_model(directory)
    source = HuggingFaceSource(directory, read.family, read.spec)
    return train(place, plan, steps, source=source, gradients=False)


def train_each(place: Place, jobs: Sequence[tuple[Plan, int]]) -> list[Outcome]:
    """`train` under each plan for so many steps, one after the other."""
    return [
        train(replace(place, store=f"{place.store}-{number}"), plan, steps)
        for number, (plan, steps) in enumerate(jobs)
    ]


def evaluate_then_train(place: Place, plan: Plan, steps: int) -> tuple[list[float], list[float]]:
    """For each step the batch's loss evaluated before the step, and the loss that the step saw."""
    return cases.evaluate_then_train(TensorFlowBackend(threads=True), place, plan, steps)


def _read_first_gradients(backend: TensorFlowBackend, plan: Plan, outcome: Outcome) -> None:
    """The reduced, unclipped gradients of the first update, by canonical slice, out of the moments that it left.

    AdamW's first moment is then the clipped gradient times 1 - beta; momentum, the clipped gradient plus the decayed weight.
    """
    training, initial = plan.training, RandomSource(plan.description, plan.training.seed)
    decays = {tensor.name: tensor.decay for tensor in plan.description.tensors()}
    clipped = 1.0
    if training.max_grad_norm is not None:
        clipped = min(1.0, training.max_grad_norm / outcome.norms[0])
    for shard in backend.shards().shards:
        if shard.slot == "exp_avg":
            gradient = shard.read() / (1.0 - training.betas[0])
        elif shard.slot == "momentum":
            decay = training.weight_decay if decays[shard.name] else 0.0
            gradient = shard.read() - decay * initial.read(shard.name, WEIGHT, shard.offset, shard.shape)
        else:
            continue
        piece = (gradient / clipped).astype(np.float32)
        outcome.gradients.append((shard.name, shard.global_shape, shard.offset, piece))
