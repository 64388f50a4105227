"""The same losses, gradients and weights in every layout, within the design's bounds."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.torch.cases import Outcome, assemble, evaluate_then_train, make_plan, train, train_each
from tests.torch.pool import WorkerPool

BOUND = 1e-5
FAMILIES = ("gpt2", "llama")

INTERLEAVED = {"degree": 2, "microbatches": 2, "schedule": "interleaved", "virtual_stages": 2}
ZB_H1 = {"degree": 2, "microbatches": 4, "schedule": "zb-h1"}
ZB_V = {"degree": 2, "microbatches": 4, "schedule": "zb-v", "virtual_stages": 2}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "dp2": (2, {}),
    "sdp2-parameters": (2, {"sharded_data_parallel": 2}),
    "sdp2-gradients": (2, {"sharded_data_parallel": {"degree": 2, "level": "gradients"}}),
    "sdp2-optimizer": (2, {"sharded_data_parallel": {"degree": 2, "level": "optimizer"}}),
    "dp2-sdp2": (4, {"sharded_data_parallel": 2}),
    "dp2-sdp2-gradients": (4, {"sharded_data_parallel": {"degree": 2, "level": "gradients"}}),
    "dp2-sdp2-optimizer": (4, {"sharded_data_parallel": {"degree": 2, "level": "optimizer"}}),
    "tp2": (2, {"tensor_parallel": 2}),
    "tp2-no-sequence": (2, {"tensor_parallel": {"degree": 2, "sequence_parallel": False}}),
    "tp4": (4, {"tensor_parallel": 4}),
    "pp2": (2, {"pipeline": {"degree": 2, "microbatches": 4}}),
    "pp2-gpipe": (2, {"pipeline": {"degree": 2, "microbatches": 4, "schedule": "gpipe"}}),
    "pp4": (4, {"pipeline": {"degree": 4, "microbatches": 8}}),
    "pp2-interleaved": (2, {"pipeline": INTERLEAVED}),
    "pp2-sdp2-interleaved": (4, {"pipeline": INTERLEAVED, "sharded_data_parallel": 2}),
    "pp2-tp2-interleaved": (4, {"pipeline": INTERLEAVED, "tensor_parallel": 2}),
    "pp2-zb-h1": (2, {"pipeline": ZB_H1}),
    "pp2-sdp2-zb-h1": (4, {"pipeline": ZB_H1, "sharded_data_parallel": 2}),
    "pp2-sdp2-optimizer-zb-h1": (
        4,
        {"pipeline": ZB_H1, "sharded_data_parallel": {"degree": 2, "level": "optimizer"}},
    ),
    "pp2-dp2-zb-h1": (4, {"pipeline": ZB_H1}),
    "pp2-tp2-zb-h1": (4, {"pipeline": ZB_H1, "tensor_parallel": 2}),
    "pp4-zb-h1": (4, {"pipeline": ZB_H1 | {"degree": 4}}),
    "pp2-zb-v": (2, {"pipeline": ZB_V}),
    "pp2-sdp2-zb-v": (4, {"pipeline": ZB_V, "sharded_data_parallel": 2}),
    "pp2-tp2-zb-v": (4, {"pipeline": ZB_V, "tensor_parallel": 2}),
    "pp2-dp2": (4, {"pipeline": {"degree": 2, "microbatches": 4}}),
    "pp2-dp2-tp2": (8, {"pipeline": {"degree": 2, "microbatches": 2}, "tensor_parallel": 2}),
    "pp2-sdp2": (4, {"pipeline": {"degree": 2, "microbatches": 4}, "sharded_data_parallel": 2}),
    "pp2-tp2": (4, {"pipeline": {"degree": 2, "microbatches": 2}, "tensor_parallel": 2}),
    "sdp2-tp2": (4, {"sharded_data_parallel": 2, "tensor_parallel": 2}),
    "pp2-tp2-placed": (
        4,
        {"pipeline": {"degree": 2, "microbatches": 2}, "tensor_parallel": 2, "placement": "tp,cp,sdp,dp,pp"},
    ),
    "pp2-sdp2-tp2": (
        8,
        {"pipeline": {"degree": 2, "microbatches": 2}, "sharded_data_parallel": 2, "tensor_parallel": 2},
    ),
}
SGD = {"optimizer": "sgd", "momentum": 0.9, "learning_rate": 0.05, "weight_decay": 0.01, "accumulation": 1}
RECOMPUTE: dict[str, Any] = {
    "full": "full",
    "full-offload": {"mode": "full", "offload": True},
    "selective-attention": {"mode": "selective", "keep": ["attention"]},
    "selective-both": {"mode": "selective", "keep": ["attention", "matmul"]},
}


def run(
    pool: WorkerPool, family: str, world_size: int, distribution: dict[str, Any], steps: int, **training: Any
) -> list[Outcome]:
    return pool.run(world_size, train, make_plan(family, world_size, distribution, **training), steps)


_references: dict[tuple[Any, ...], list[Outcome]] = {}


def reference(pool: WorkerPool, family: str, steps: int, **training: Any) -> list[Outcome]:
    key = (family, steps, *sorted(training.items()))
    if key not in _references:
        _references[key] = run(pool, family, 1, {}, steps, **training)
    return _references[key]


def assert_close(
    actual: dict[str, NDArray[Any]], expected: dict[str, NDArray[Any]], floor: float = 0.0
) -> None:
    assert actual.keys() == expected.keys()
    for name, wanted in expected.items():
        difference = np.abs(actual[name] - wanted).max()
        assert difference <= BOUND * np.abs(wanted).max() + floor, f"{name}: off by {difference}"


def assert_parity(outcomes: list[Outcome], expected: list[Outcome]) -> None:
    for outcome in outcomes:
        np.testing.assert_allclose(outcome.losses, expected[0].losses, rtol=BOUND)
        np.testing.assert_allclose(outcome.norms, expected[0].norms, rtol=BOUND)
    gradients, wanted = (assemble([p for o in some for p in o.gradients]) for some in (outcomes, expected))
    largest = max(np.abs(gradient).max() for gradient in wanted.values())
    assert_close(gradients, wanted, floor=1e-9 * largest)


def assert_same_weights(outcomes: list[Outcome], expected: list[Outcome]) -> None:
    gradients = assemble([piece for outcome in expected for piece in outcome.gradients])
    largest = max(np.abs(gradient).max() for gradient in gradients.values())
    state, wanted = (assemble([p for o in some for p in o.state]) for some in (outcomes, expected))
    assert_close(state, wanted, floor=1e-9 * largest)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_ten_adamw_steps_give_the_single_process_losses_norms_and_first_gradients(
    pool: WorkerPool, family: str, layout: str
) -> None:
    world_size, distribution = LAYOUTS[layout]
    assert_parity(run(pool, family, world_size, distribution, 10), reference(pool, family, 10))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_ten_sgd_steps_give_the_single_process_weights(pool: WorkerPool, family: str, layout: str) -> None:
    """Without accumulation, which the steps of AdamW have."""
    world_size, distribution = LAYOUTS[layout]
    outcomes = run(pool, family, world_size, distribution, 10, **SGD)
    expected = reference(pool, family, 10, **SGD)
    assert_parity(outcomes, expected)
    assert_same_weights(outcomes, expected)


RECOMPUTED = [
    *product(FAMILIES, ["single", "sdp2-parameters", "pp2-tp2", "pp2-sdp2-tp2", "pp2-tp2-zb-h1", "pp2-sdp2-zb-v"]),
    ("gpt2", "pp2-sdp2-interleaved"), ("llama", "pp2-tp2-interleaved"),
    ("llama", "pp2-sdp2-zb-h1"), ("gpt2", "pp2-tp2-zb-v"),
]  # fmt: skip


@pytest.fixture(scope="module", params=RECOMPUTED, ids="-".join)
def recomputed(request: pytest.FixtureRequest, pool: WorkerPool) -> tuple[str, dict[str, list[Outcome]]]:
    """A family, and for each way of recomputing two steps: all in one visit to the pool."""
    family, layout = request.param
    world_size, distribution = LAYOUTS.get(layout, (1, {}))
    plans = [
        make_plan(family, world_size, distribution | {"activation_checkpointing": mode})
        for mode in RECOMPUTE.values()
    ]
    by_rank = pool.run(world_size, train_each, [(plan, 2) for plan in plans])
    return family, dict(zip(RECOMPUTE, map(list, zip(*by_rank, strict=True)), strict=True))


@pytest.mark.parametrize("mode", RECOMPUTE)
def test_recompute_changes_no_digit_that_matters(
    pool: WorkerPool, recomputed: tuple[str, dict[str, list[Outcome]]], mode: str
) -> None:
    family, outcomes = recomputed
    assert_parity(outcomes[mode], reference(pool, family, 2))


DEEP: dict[str, tuple[int, dict[str, Any]]] = {
    f"pp4{extent and '-'}{extent}-{pipeline['schedule']}": (
        8 if extent else 4,
        {"pipeline": pipeline | {"degree": 4, "microbatches": 4 if extent else 8}, **more},
    )
    for pipeline in (INTERLEAVED, ZB_H1, ZB_V)
    for extent, more in {
        "": {},
        "sdp2": {"sharded_data_parallel": 2},
        "tp2": {"tensor_parallel": 2},
    }.items()
}


@pytest.mark.parametrize("layout", DEEP)
def test_four_stages_of_two_blocks_give_the_single_process_results_with_and_without_recompute(
    pool: WorkerPool, layout: str
) -> None:
    """Ten steps of AdamW under full recompute, ten of SGD under selective recompute, two that keep everything."""
    world_size, distribution = DEEP[layout]
    runs: list[tuple[str, str, int, dict[str, Any]]] = [
        ("llama-deep", "full", 10, {"accumulation": 1}),
        ("gpt2-deep", "selective-both", 10, SGD),
        ("llama-deep", "none", 2, {"accumulation": 1}),
    ]
    jobs = []
    for family, mode, steps, training in runs:
        whole = distribution | {"activation_checkpointing": RECOMPUTE.get(mode, mode)}
        jobs.append((make_plan(family, world_size, whole, **training), steps))
    for by_rank, (family, _, steps, training) in zip(
        zip(*pool.run(world_size, train_each, jobs), strict=True), runs, strict=True
    ):
        outcomes, expected = list(by_rank), reference(pool, family, steps, **training)
        assert_parity(outcomes, expected)
        if training is SGD:
            assert_same_weights(outcomes, expected)


UNEVEN: dict[str, tuple[int, dict[str, Any]]] = {
    "sdp3-parameters": (3, {"sharded_data_parallel": 3}),
    "sdp3-gradients": (3, {"sharded_data_parallel": {"degree": 3, "level": "gradients"}}),
    "sdp3-optimizer": (3, {"sharded_data_parallel": {"degree": 3, "level": "optimizer"}}),
    "sdp3-tp2": (6, {"sharded_data_parallel": 3, "tensor_parallel": 2}),
    "pp2-sdp3": (6, {"sharded_data_parallel": 3, "pipeline": {"degree": 2, "microbatches": 4}}),
}


@pytest.mark.parametrize("layout", UNEVEN)
def test_shards_of_unequal_size_change_nothing(pool: WorkerPool, layout: str) -> None:
    """Three ranks divide neither 64 nor 104 rows."""
    world_size, distribution = UNEVEN[layout]
    outcomes = run(pool, "gpt2", world_size, distribution, 3, global_batch=24)
    assert_parity(outcomes, reference(pool, "gpt2", 3, global_batch=24))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("level", ["parameters", "gradients", "optimizer"])
def test_an_evaluation_between_steps_sees_the_weights_of_its_step(
    pool: WorkerPool, level: str, precision: str
) -> None:
    """The loss of a batch before it is trained on is its training loss, whatever an earlier forward left gathered."""
    distribution = {"sharded_data_parallel": {"degree": 2, "level": level}, "precision": precision}
    for evaluated, trained in pool.run(2, evaluate_then_train, make_plan("gpt2", 2, distribution), 3):
        np.testing.assert_allclose(evaluated, trained, rtol=BOUND)


def test_stages_of_unequal_size_change_nothing(pool: WorkerPool) -> None:
    distribution = {"pipeline": {"degree": 3, "microbatches": 4, "partition": [1, 2, 1]}}
    assert_parity(run(pool, "llama", 3, distribution, 3), reference(pool, "llama", 3))
