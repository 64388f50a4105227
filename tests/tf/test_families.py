"""Every family with every head in other layouts, against one process. `tests/parity` has them against transformers.

By default each objective runs in each kind of layout and each family somewhere; the whole product is `long`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.cases import BOUND, assert_parity
from tests.family_layouts import LAYOUTS, every_objective_in_every_kind, marked
from tests.tf import ranks
from tests.tf.cases import evaluate_then_train, make_plan, train


@pytest.mark.parametrize(("name", "layout"), marked(every_objective_in_every_kind()))
def test_four_steps_give_the_single_process_losses_norms_and_first_gradients(name: str, layout: str) -> None:
    """Padded rows wherever the objective takes them."""
    family, _, objective = name.partition("-")
    world_size, distribution = LAYOUTS[layout]
    alone = ranks.run(1, train, make_plan(family, 1, {}, objective=objective), 4)
    plan = make_plan(family, world_size, distribution, objective=objective)
    assert_parity(ranks.run(world_size, train, plan, 4), alone)


COMPILED: dict[str, dict[str, Any]] = {"pieces": {}, "islands": LAYOUTS["tp2"][1]}


@pytest.mark.parametrize("compiled", COMPILED)
def test_compiling_changes_no_digit_that_matters(compiled: str) -> None:
    """Masks, windows and a classifier under XLA."""
    distribution = COMPILED[compiled]
    world_size = 2 if distribution else 1
    alone = ranks.run(1, train, make_plan("mistral", 1, {}, objective="token-classification"), 3)
    plan = make_plan(
        "mistral", world_size, distribution | {"compile": True}, objective="token-classification"
    )
    assert_parity(ranks.run(world_size, train, plan, 3), alone)


@pytest.mark.parametrize("layout", ["tp2", "tp2-no-sequence", "pp2-tp2"])
@pytest.mark.parametrize("objective", ["sequence-classification", "token-classification"])
def test_an_evaluation_sees_the_loss_of_the_step_after_it(objective: str, layout: str) -> None:
    world_size, distribution = LAYOUTS[layout]
    plan = make_plan("bert", world_size, distribution, objective=objective)
    for evaluated, trained in ranks.run(world_size, evaluate_then_train, plan, 2):
        np.testing.assert_allclose(evaluated, trained, rtol=BOUND)
