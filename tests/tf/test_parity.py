"""The same losses, gradients and weights in every layout, within the design's bounds.

By default every second layout runs, with the families by turns; the whole product is `long` (`tests/turns.py`). What takes a
rank long here is tracing: PyTorch's twin of this file runs every layout, and `tests/parity` compares the two.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.cases import BOUND, Outcome, assert_parity, assert_same_weights
from tests.layouts import DEEP, FAMILIES, LAYOUTS, RECOMPUTE, RECOMPUTED, SGD, UNEVEN
from tests.tf import ranks
from tests.tf.cases import evaluate_then_train, make_plan, train, train_each
from tests.turns import in_turn, one_in

GPIPE = {"degree": 2, "microbatches": 2, "schedule": "gpipe"}
LAYOUTS_HERE = LAYOUTS | {
    "pp2-sdp2-gpipe": (4, {"pipeline": GPIPE, "sharded_data_parallel": 2}),
    "pp2-tp2-gpipe": (4, {"pipeline": GPIPE, "tensor_parallel": 2}),
}


def run(
    family: str, world_size: int, distribution: dict[str, Any], steps: int, **training: Any
) -> list[Outcome]:
    return ranks.run(world_size, train, make_plan(family, world_size, distribution, **training), steps)


_references: dict[tuple[Any, ...], list[Outcome]] = {}


def reference(family: str, steps: int, **training: Any) -> list[Outcome]:
    key = (family, steps, *sorted(training.items()))
    if key not in _references:
        _references[key] = run(family, 1, {}, steps, **training)
    return _references[key]


@pytest.mark.parametrize(("layout", "family"), one_in(2, in_turn(LAYOUTS_HERE, FAMILIES)))
def test_ten_adamw_steps_give_the_single_process_losses_norms_and_first_gradients(
    family: str, layout: str
) -> None:
    world_size, distribution = LAYOUTS_HERE[layout]
    assert_parity(run(family, world_size, distribution, 10), reference(family, 10))


@pytest.mark.parametrize(("layout", "family"), one_in(4, in_turn(LAYOUTS_HERE, FAMILIES, start=1)))
def test_ten_sgd_steps_give_the_single_process_weights(family: str, layout: str) -> None:
    """Without accumulation, which the steps of AdamW have."""
    world_size, distribution = LAYOUTS_HERE[layout]
    outcomes = run(family, world_size, distribution, 10, **SGD)
    expected = reference(family, 10, **SGD)
    assert_parity(outcomes, expected)
    assert_same_weights(outcomes, expected)


@pytest.mark.parametrize(("family", "layout", "mode"), one_in(2, in_turn(RECOMPUTED, tuple(RECOMPUTE))))
def test_recompute_changes_no_digit_that_matters(family: str, layout: str, mode: str) -> None:
    world_size, distribution = LAYOUTS.get(layout, (1, {}))
    outcomes = run(family, world_size, distribution | {"activation_checkpointing": RECOMPUTE[mode]}, 2)
    assert_parity(outcomes, reference(family, 2))


COMPILED: dict[str, tuple[str, int, dict[str, Any]]] = {
    "single": ("gpt2", 1, {}),
    "sdp2-recomputed": ("llama", 2, {"sharded_data_parallel": 2, "activation_checkpointing": "full"}),
    "tp2": ("gpt2", 2, LAYOUTS["tp2"][1]),
    "pp2-tp2": ("llama", 4, LAYOUTS["pp2-tp2"][1]),
    "pp2-sdp2-zb-h1": ("gpt2", 4, LAYOUTS["pp2-sdp2-zb-h1"][1]),
}


@pytest.mark.parametrize("layout", COMPILED)
def test_compiling_changes_no_digit_that_matters(layout: str) -> None:
    family, world_size, distribution = COMPILED[layout]
    outcomes = run(family, world_size, distribution | {"compile": True}, 10, **SGD)
    expected = reference(family, 10, **SGD)
    assert_parity(outcomes, expected)
    assert_same_weights(outcomes, expected)


@pytest.mark.parametrize(
    "layout",
    [pytest.param(layout, marks=() if layout == "pp4-zb-h1" else pytest.mark.long) for layout in DEEP],
)
def test_four_stages_of_two_blocks_give_the_single_process_results_with_and_without_recompute(
    layout: str,
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
        zip(*ranks.run(world_size, train_each, jobs), strict=True), runs, strict=True
    ):
        outcomes, expected = list(by_rank), reference(family, steps, **training)
        assert_parity(outcomes, expected)
        if training is SGD:
            assert_same_weights(outcomes, expected)


@pytest.mark.parametrize("layout", UNEVEN)
def test_shards_of_unequal_size_change_nothing(layout: str) -> None:
    """Three ranks divide neither 64 nor 104 rows."""
    world_size, distribution = UNEVEN[layout]
    outcomes = run("gpt2", world_size, distribution, 3, global_batch=24)
    assert_parity(outcomes, reference("gpt2", 3, global_batch=24))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("level", ["parameters", "gradients", "optimizer"])
def test_an_evaluation_between_steps_sees_the_weights_of_its_step(level: str, precision: str) -> None:
    """The loss of a batch before it is trained on is its training loss, whatever an earlier forward left gathered."""
    distribution = {"sharded_data_parallel": {"degree": 2, "level": level}, "precision": precision}
    for evaluated, trained in ranks.run(2, evaluate_then_train, make_plan("gpt2", 2, distribution), 3):
        np.testing.assert_allclose(evaluated, trained, rtol=BOUND)


def test_stages_of_unequal_size_change_nothing() -> None:
    distribution = {"pipeline": {"degree": 3, "microbatches": 4, "partition": [1, 2, 1]}}
    assert_parity(run("llama", 3, distribution, 3), reference("llama", 3))
