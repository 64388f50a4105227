"""The estimate against what PyTorch really holds."""

from __future__ import annotations

import gc
from typing import Any

import pytest

from mpsdk.backend import Place
from mpsdk.estimate import estimate
from mpsdk.initialise import RandomSource
from mpsdk.plan import Plan
from tests.torch.cases import global_batch, make_plan, rows_of
from tests.torch.pool import WorkerPool

SEVERAL = {"pipeline": {"microbatches": 2}}
TP = SEVERAL | {"tensor_parallel": 2}
TP_WHOLE = SEVERAL | {"tensor_parallel": {"degree": 2, "sequence_parallel": False}}
PP3: dict[str, Any] = {"pipeline": {"degree": 3, "microbatches": 4, "partition": [1, 2, 1]}}
NONE: dict[str, Any] = {}
FULL = {"activation_checkpointing": "full"}
OFFLOAD = {"activation_checkpointing": {"mode": "full", "offload": True}}
ATTENTION = {"activation_checkpointing": {"mode": "selective", "keep": ["attention"]}}
MATMUL = {"activation_checkpointing": {"mode": "selective", "keep": ["matmul"]}}
BOTH = {"activation_checkpointing": {"mode": "selective", "keep": ["attention", "matmul"]}}
BF16 = {"precision": "bf16"}
SCALARS = 16  # bytes: the loss, its divisor, a count
LAYOUTS = {"single": (1, SEVERAL), "tp2": (2, TP), "tp2-whole-sequence": (2, TP_WHOLE), "pp3": (3, PP3)}
MODES = {
    "none": NONE,
    "full": FULL,
    "offload": OFFLOAD,
    "attention": ATTENTION,
    "matmul": MATMUL,
    "both": BOTH,
}


def kept_bytes(place: Place, plan: Plan) -> int:
    """Bytes that are alive on this rank between one microbatch's forward and its backward, parameters apart."""
    import torch

    from mpsdk_torch.backend import TorchBackend
    from mpsdk_torch.sharded import release
    from tests.torch.memory import Memory

    backend = TorchBackend()
    try:
        backend.build(plan, place)
        backend.load(RandomSource(plan.description, plan.training.seed))
        trainer = backend._ready.trainer
        ((number, stage),) = trainer.stages.items()
        trainer._load(rows_of(global_batch(0, plan.description.vocab_size or 0), plan, place.rank), 0)

        def forward() -> tuple[Any, Any]:
            hidden = trainer._empty_hidden().normal_().requires_grad_() if number else None
            output = trainer._forward_of(number)(hidden, 0)
            if number == len(plan.stages) - 1:
                output = trainer._loss(output, 0)
            return torch.autograd.graph.get_gradient_edge(output), hidden

        def warm_up() -> None:
            edge, _hidden = forward()
            last = number == len(plan.stages) - 1
            torch.autograd.backward((edge,), None if last else (torch.zeros_like(trainer._empty_hidden()),))

        warm_up()
        release(stage)
        with Memory() as memory:
            graph = forward()
            release(stage)
            gc.collect()
            kept = memory.bytes
        del graph
        return kept
    finally:
        backend.close()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_activations_of_a_microbatch(
    pool: WorkerPool, family: str, layout: str, mode: str, precision: str
) -> None:
    world_size, distribution = LAYOUTS[layout]
    plan = make_plan(family, world_size, distribution | MODES[mode] | {"precision": precision})
    found = estimate(plan, device="cpu")
    for rank, measured in enumerate(pool.run(world_size, kept_bytes, plan)):
        expected = found.memory_of(rank).activations_of_one - padding_bytes(plan, rank)
        assert measured == pytest.approx(expected, abs=SCALARS)


def padding_bytes(plan: Plan, rank: int) -> int:
    """What the loss keeps less on `rank` than at tensor-parallel coordinate 0, for its padding rows of the vocabulary."""
    if len(plan.stages) - 1 not in plan.stages_of(rank):
        return 0
    rows, words = plan.padded_vocab_size // plan.degrees.tp, plan.description.vocab_size or 0
    here = max(0, min(rows, words - plan.topology.coordinates(rank).tp * rows))
    return 4 * plan.microbatch_size * plan.training.sequence_length * (min(rows, words) - here)
