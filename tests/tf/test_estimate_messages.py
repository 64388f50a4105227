"""The estimate's messages and FLOPs against what stands in TensorFlow's programs."""

from __future__ import annotations

from typing import Any

import pytest

from mpsdk.estimate import estimate
from mpsdk.plan import Plan
from mpsdk.topology import Coordinates
from tests.estimated import (
    BF16,
    BOTH,
    DROPOUT,
    FULL,
    GRADIENTS,
    INTERLEAVED,
    MESSAGES,
    OPTIMIZER,
    SDP2,
    SEVERAL,
    TP2,
    UNTIED,
    ZB_H1,
    ZB_V,
    Case,
    expected_messages,
)
from tests.tf.cases import make_plan
from tests.tf.programs import Program, built, count
from tests.turns import one_in


def gpipe(degree: int) -> dict[str, Any]:
    return {"pipeline": {"degree": degree, "microbatches": 4, "schedule": "gpipe"}}


def prefetch(parts: int) -> dict[str, Any]:
    return SEVERAL | {"sharded_data_parallel": {"degree": 2, "prefetch": parts}}


TP = {"tensor_parallel": 2}
CASES: dict[str, Case] = MESSAGES | {
    "gpipe": ("gpt2", 2, gpipe(2), {}),
    "gpipe-sdp2": ("llama", 4, gpipe(2) | SDP2, {}),
    "gpipe-sdp2-tied-in-one-stage": ("gpt2", 2, gpipe(1) | SDP2, {}),
    "interleaved-sdp2-optimizer": ("gpt2", 4, INTERLEAVED | OPTIMIZER | BF16, {}),
    "zb-h1-sdp2-gradients": ("llama", 4, ZB_H1 | GRADIENTS, {}),
    "zb-h1-tp2-full-dropout": ("gpt2", 4, ZB_H1 | TP | FULL, DROPOUT),
    "zb-v-sdp2": ("gpt2", 4, ZB_V | SDP2, {}),
    "zb-v-tp2-both": ("llama", 4, ZB_V | TP | BOTH, {}),
    "sdp2-prefetch-nothing": ("llama", 2, prefetch(0), {}),
    "sdp2-prefetch-3": ("gpt2", 2, prefetch(3), UNTIED),
    "tp2-fp16": ("gpt2", 2, TP2 | {"precision": "fp16"}, {}),
}
# Each shows what two others show together.
LONG = {
    "dp2-sdp2-gradients", "gpipe-sdp2", "interleaved-sdp2-optimizer", "pp2-sdp2-one-pass", "sdp2-untied-one-backward",
    "single-attention", "tp2-full-dropout",
}  # fmt: skip
COMPILED: dict[str, Case] = {
    "tp2": ("gpt2", 2, TP2, {}),
    "tp2-full": ("llama", 2, TP2 | FULL, {}),
    "sdp2": ("gpt2", 2, SEVERAL | SDP2, {}),
}


def ends(plan: Plan) -> set[int]:
    """At each pipeline coordinate, the first rank and the last: of those between, the estimate says the same."""
    last = plan.degrees
    return {
        plan.topology.rank_of(Coordinates(pp=pp, dp=dp, sdp=sdp, tp=tp))
        for pp in range(last.pp)
        for dp, sdp, tp in ((0, 0, 0), (last.dp - 1, last.sdp - 1, last.tp - 1))
    }


def programs(plan: Plan, rank: int) -> tuple[Program, Program]:
    with built(plan, rank) as backend:
        return count(backend, plan)


@pytest.mark.parametrize(
    "case",
    one_in(
        2, [pytest.param(case, id=case, marks=pytest.mark.long if case in LONG else ()) for case in CASES]
    ),
)
def test_messages_and_matrix_products_of_a_step(case: str) -> None:
    family, world_size, distribution, training = CASES[case]
    plan = make_plan(family, world_size, distribution, **training)
    compute = estimate(plan, device="cpu").compute
    for rank in ends(plan):
        step, report = programs(plan, rank)
        assert step.sent == expected_messages(plan, rank, "step"), rank
        assert report.sent == expected_messages(plan, rank, "report"), rank
        passes = plan.microbatches * plan.training.accumulation
        stages = [compute[stage] for stage in plan.stages_of(rank)]
        assert step.matrix_flops == pytest.approx(
            passes * sum(3 * stage.linear + stage.linear_again for stage in stages), rel=1e-12
        )


@pytest.mark.parametrize("case", COMPILED)
def test_messages_of_a_compiled_step(case: str) -> None:
    family, world_size, distribution, training = COMPILED[case]
    plan = make_plan(family, world_size, distribution | {"compile": True}, **training)
    for rank in range(world_size):
        step, report = programs(plan, rank)
        assert step.sent == expected_messages(plan, rank, "step"), rank
        assert report.sent == expected_messages(plan, rank, "report"), rank
