"""Scaling on paper: for each model and number of GPUs, the fastest of some layouts that fit, and how long its step takes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from mpsdk.config import Distribution, Training
from mpsdk.cost import STATE_BYTES_PER_PARAMETER, forward_flops
from mpsdk.description import ModelDescription
from mpsdk.errors import ConfigError
from mpsdk.estimate import DeviceFigures, StepTime
from mpsdk.families import read_model
from mpsdk.families.describe import describe_spec
from mpsdk.plan import Plan
from mpsdk.resolve import resolve

RANKS = tuple(8 * 2**power for power in range(10))  # 8 to 4,096
PRECISION = "bf16"
TOKENS_OF_A_MICROBATCH = 8192


@dataclass(frozen=True)
class Model:
    """A model and its batches, in sequences: of a rank when the batch grows with the ranks, and of a step when it does not."""

    name: str
    config: dict[str, Any]
    length: int
    a_rank: int
    a_step: int

    def describe(self) -> ModelDescription:
        return describe_spec(read_model(self.config).spec)


def _llama(width: int, blocks: int, heads: int, features: int) -> dict[str, Any]:
    return {
        "model_type": "llama", "vocab_size": 128256, "max_position_embeddings": 8192, "hidden_size": width,
        "num_hidden_layers": blocks, "num_attention_heads": heads, "num_key_value_heads": 8,
        "intermediate_size": features,
    }  # fmt: skip


_GPT2 = {
    "model_type": "gpt2", "vocab_size": 50257, "n_positions": 1024, "n_embd": 1600, "n_layer": 48, "n_head": 25,
    "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
}  # fmt: skip

MODELS = (
    Model("GPT-2 1.5B", _GPT2, length=1024, a_rank=16, a_step=4096),
    Model("Llama 8B", _llama(4096, 32, 32, 14336), length=8192, a_rank=2, a_step=512),
    Model("Llama 70B", _llama(8192, 80, 64, 28672), length=8192, a_rank=2, a_step=512),
)


@dataclass(frozen=True)
class Point:
    """The fastest layout of a model on this many ranks, or `layout` None where none fits. `planned`: seconds that resolving
    its plan took."""

    model: str
    scaling: str
    ranks: int
    global_batch: int
    layout: dict[str, Any] | None
    peak: int
    time: StepTime | None
    planned: float

    def to_dict(self) -> dict[str, Any]:
        return {**vars(self), "time": self.time.to_dict() if self.time else None}


def curves(figures: DeviceFigures) -> list[Point]:
    """Weak and strong scaling of all models."""
    return [
        best(model, scaling, ranks, figures)
        for model in MODELS
        for scaling in ("weak", "strong")
        for ranks in RANKS
    ]


def best(model: Model, scaling: str, ranks: int, figures: DeviceFigures) -> Point:
    """The fastest of the layouts that fit."""
    description = model.describe()
    batch = ranks * model.a_rank if scaling == "weak" else model.a_step
    found = Point(model.name, scaling, ranks, batch, None, 0, None, 0.0)
    for layout in _layouts(model, description, ranks, batch, figures):
        if (
            found.time is not None
            and _least(description, model, batch, ranks, layout, figures) > found.time.seconds
        ):
            continue
        for recompute in ("none", "selective", "full"):  # the first that fits is the fastest
            begin = time.perf_counter()
            plan = _plan(model, description, ranks, batch, {**layout, "activation_checkpointing": recompute})
            planned = time.perf_counter() - begin
            if plan is None:
                break
            estimate = plan.estimate(figures)
            if not estimate.fits():
                continue
            taken = estimate.step_time()
            if found.time is None or taken.seconds < found.time.seconds:
                said = _said(plan, recompute)
                found = Point(model.name, scaling, ranks, batch, said, estimate.fullest.peak, taken, planned)
            break
    return found


def _layouts(
    model: Model, description: ModelDescription, ranks: int, batch: int, figures: DeviceFigures
) -> Iterator[dict[str, Any]]:
    """Degrees that are powers of two; tensor parallelism within a machine, shares over 64 ranks at most."""
    rows = max(1, TOKENS_OF_A_MICROBATCH // model.length)
    for pp in (1, 2, 4, 8, 16):
        for tp in (1, 2, 4, 8):
            data = ranks // (tp * pp)
            if data < 1 or batch % data:
                continue
            sdp = min(data, 64)
            states = STATE_BYTES_PER_PARAMETER * description.parameters / (tp * pp * sdp)
            microbatches = max(1, batch // data // rows)
            room = figures.usable_memory(ranks) - states
            if room < 0 or (pp > 1 and not 2 * pp - 1 <= microbatches <= 128):
                continue
            levels = ["parameters"]
            # Weights that stay whole over all microbatches, beside the shares of the states.
            if sdp > 1 and microbatches > 1 and room > 2 * description.parameters / (tp * pp):
                levels.append("gradients")
            for level in levels:
                yield {
                    "pipeline": {"degree": pp, "microbatches": microbatches},
                    "tensor_parallel": tp,
                    "sharded_data_parallel": {"degree": sdp, "level": level} if sdp > 1 else 1,
                    "precision": PRECISION,
                }


def _least(
    description: ModelDescription,
    model: Model,
    batch: int,
    ranks: int,
    layout: dict[str, Any],
    figures: DeviceFigures,
) -> float:
    """Seconds below which no step of this layout can be: products alone, at their best, and the pipeline's bubble."""
    flops = 3 * forward_flops(description, model.length) * batch * model.length
    fastest = max(rate.per_second for rate in figures.at(8).matmul[PRECISION])
    pipeline = layout["pipeline"]
    return flops / (ranks * fastest) * (1 + (pipeline["degree"] - 1) / pipeline["microbatches"])


def _plan(
    model: Model, description: ModelDescription, ranks: int, batch: int, distribution: dict[str, Any]
) -> Plan | None:
    training = Training(global_batch=batch, sequence_length=model.length, tokenizer="bytes")
    try:
        return resolve(
            Distribution.parse(distribution), description, training, world_size=ranks, framework="torch"
        )
    except ConfigError:  # 25 heads can't be cut in two
        return None


def _said(plan: Plan, recompute: str) -> dict[str, Any]:
    degrees = plan.degrees
    return {
        "pp": degrees.pp,
        "dp": degrees.dp,
        "sdp": degrees.sdp,
        "tp": degrees.tp,
        "microbatches": plan.microbatches,
        "level": plan.distribution.sharded_data_parallel.level if degrees.sdp > 1 else None,
        "recompute": recompute,
    }
