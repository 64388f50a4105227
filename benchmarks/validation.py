"""Predicted against measured: the step of a small GPT-2 on this machine's CPU, in several layouts of 1 to 8 ranks."""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from benchmarks.ranks import Ranks
from mpsdk.backend import Batch, Place
from mpsdk.config import Distribution, Training
from mpsdk.estimate import DeviceFigures
from mpsdk.families import read_model
from mpsdk.families.describe import describe_spec
from mpsdk.plan import Plan
from mpsdk.resolve import resolve

MODEL = {
    "model_type": "gpt2", "vocab_size": 4096, "n_positions": 128, "n_embd": 256, "n_layer": 8, "n_head": 8,
    "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
}  # fmt: skip
BATCH, LENGTH = 16, 128  # sequences a step, tokens a sequence
WARM_UP, FEWEST, SECONDS = 2, 3, 1.5

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one rank": (1, {}),
    "one rank, recompute": (1, {"activation_checkpointing": "full"}),
    "dp 2": (2, {}),
    "sdp 2": (2, {"sharded_data_parallel": 2}),
    "tp 2": (2, {"tensor_parallel": 2}),
    "pp 2, 1f1b": (2, {"pipeline": {"degree": 2, "microbatches": 8}}),
    "dp 4": (4, {}),
    "sdp 4": (4, {"sharded_data_parallel": 4}),
    "tp 4": (4, {"tensor_parallel": 4}),
    "pp 4, 1f1b": (4, {"pipeline": {"degree": 4, "microbatches": 8}}),
    "pp 2 · tp 2": (4, {"pipeline": {"degree": 2, "microbatches": 4}, "tensor_parallel": 2}),
    "sdp 8": (8, {"sharded_data_parallel": 8}),
    "pp 4 · dp 2": (8, {"pipeline": {"degree": 4, "microbatches": 8}}),
    "pp 2 · sdp 2 · tp 2": (
        8,
        {"pipeline": {"degree": 2, "microbatches": 4}, "sharded_data_parallel": 2, "tensor_parallel": 2},
    ),
}


@dataclass(frozen=True)
class Comparison:
    """A layout's seconds a step. `error`: predicted over measured, less 1."""

    layout: str
    ranks: int
    predicted: float
    measured: float

    @property
    def error(self) -> float:
        return self.predicted / self.measured - 1

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "error": self.error}


def validate(ranks: Ranks, figures: DeviceFigures) -> list[Comparison]:
    """Predict each layout from `figures`, then run it."""
    found: list[Comparison] = []
    for name, (world_size, distribution) in LAYOUTS.items():
        plan = plan_of(world_size, distribution)
        predicted = plan.estimate(figures).step_time().seconds
        steps = min(30, max(FEWEST, math.ceil(SECONDS / predicted)))
        measured = max(ranks.call(world_size, train, plan.to_json(), steps))
        found.append(Comparison(name, world_size, predicted, measured))
    return found


def plan_of(world_size: int, distribution: dict[str, Any]) -> Plan:
    return resolve(
        Distribution.parse(distribution),
        describe_spec(read_model(MODEL).spec),
        Training(global_batch=BATCH, sequence_length=LENGTH, tokenizer="bytes"),
        world_size=world_size,
        framework="torch",
    )


def train(place: Place, planned: str, steps: int) -> float:
    """Seconds a step on this rank, after a few to warm up."""
    from mpsdk.initialise import RandomSource
    from mpsdk_torch.backend import TorchBackend

    plan = Plan.from_json(planned)
    backend = TorchBackend()
    try:
        backend.build(plan, place)
        backend.load(RandomSource(plan.description, seed=0))
        batch = _batch(plan, place.rank)

        def run(first: int, count: int) -> None:
            for step in range(first, first + count):
                pending = backend.step(batch, step=step, learning_rate=1e-4)
            pending.read()

        run(0, WARM_UP)
        begin = time.perf_counter()
        run(WARM_UP, steps)
        return (time.perf_counter() - begin) / steps
    finally:
        backend.close()


def _batch(plan: Plan, rank: int) -> Batch:
    random = np.random.default_rng(plan.topology.data_rank(rank))
    shape = (plan.training.accumulation, plan.microbatches, plan.microbatch_size, LENGTH)
    return {
        name: random.integers(MODEL["vocab_size"], size=shape, dtype=np.int32)
        for name in ("input_ids", "labels")
    }
