"""The same losses, gradients and weights in every layout, within the design's bounds.

By default each layout runs once with each family and once with each optimizer; the whole product is `long` (`in_turn`).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.cases import BOUND, Outcome, assert_parity, assert_same_weights
from tests.layouts import DEEP, FAMILIES, LAYOUTS, RECOMPUTE, RECOMPUTED, SGD, UNEVEN
from tests.torch.cases import evaluate_then_train, make_plan, train, train_each
from tests.torch.pool import WorkerPool
from tests.turns import in_turn, one_in


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


@pytest.mark.parametrize(("layout", "family"), in_turn(LAYOUTS, FAMILIES))
def test_ten_adamw_steps_give_the_single_process_losses_norms_and_first_gradients(
    pool: WorkerPool, family: str, layout: str
) -> None:
    world_size, distribution = LAYOUTS[layout]
    assert_parity(run(pool, family, world_size, distribution, 10), reference(pool, family, 10))


@pytest.mark.parametrize(("layout", "family"), one_in(4, in_turn(LAYOUTS, FAMILIES, start=1)))
def test_ten_sgd_steps_give_the_single_process_weights(pool: WorkerPool, family: str, layout: str) -> None:
    """Without accumulation, which the steps of AdamW have."""
    world_size, distribution = LAYOUTS[layout]
    outcomes = run(pool, family, world_size, distribution, 10, **SGD)
    expected = reference(pool, family, 10, **SGD)
    assert_parity(outcomes, expected)
    assert_same_weights(outcomes, expected)


@pytest.mark.parametrize(("family", "layout", "mode"), in_turn(RECOMPUTED, tuple(RECOMPUTE)))
def test_recompute_changes_no_digit_that_matters(
    pool: WorkerPool, family: str, layout: str, mode: str
) -> None:
    world_size, distribution = LAYOUTS.get(layout, (1, {}))
    outcomes = run(pool, family, world_size, distribution | {"activation_checkpointing": RECOMPUTE[mode]}, 2)
    assert_parity(outcomes, reference(pool, family, 2))


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(layout, marks=() if world_size < 8 else pytest.mark.long)
        for layout, (world_size, _) in DEEP.items()
    ],
)
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
