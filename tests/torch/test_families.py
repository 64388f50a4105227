"""Every family with every head against transformers' own class, and in other layouts against one process."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mpsdk.backend import IGNORED_LABEL
from tests.cases import BOUND, EVERY_HEAD, assert_parity
from tests.family_configs import configs
from tests.family_layouts import LAYOUTS, every_family_in_every_kind, marked
from tests.torch.beside_transformers import Case, inputs, labels_for, loss_of
from tests.torch.cases import evaluate_then_train, make_plan, train
from tests.torch.pool import WorkerPool


@pytest.mark.parametrize("name", EVERY_HEAD)
@settings(max_examples=6, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(data=st.data())
def test_logits_loss_and_every_gradient_are_those_of_transformers(name: str, data: st.DataObject) -> None:
    """Over random configurations, with no padding, left and right.

    In float64, where gradients that are zero by symmetry are zero to 1e-16; transformers turns positions in float32.
    """
    family, _, head = name.partition("-")
    case = Case(data.draw(configs(family)), head)
    spec = case.spec
    sides = (
        ["none", "right"] if spec.head.pooled == "first" and not spec.causal else ["none", "left", "right"]
    )
    given = inputs(spec, data.draw(st.sampled_from(sides)), data.draw(st.integers(0, 99)))
    mask = given["attention_mask"]

    theirs = case.theirs(**given).logits
    ours = case.ours(given.pop("input_ids"), **given)
    seen = slice(None) if head == "sequence-classification" else mask.bool()
    difference = (ours - theirs)[seen].abs().max()
    assert difference <= BOUND * theirs[seen].abs().max(), f"logits off by {difference}"

    labels = labels_for(spec, mask, 5)
    expected = torch.nn.functional.cross_entropy(
        theirs.flatten(0, -2), labels.flatten(), ignore_index=IGNORED_LABEL, reduction="sum"
    )
    found = loss_of(spec, ours, labels)
    assert found.item() == pytest.approx(expected.item(), rel=BOUND)
    expected.backward()
    found.backward()
    gradients = case.gradients()
    largest = max(float(wanted.abs().max()) for _, wanted in gradients.values())
    for tensor, (got, wanted) in gradients.items():
        off = float((got - wanted).abs().max())
        assert off <= BOUND * float(wanted.abs().max()) + 1e-9 * largest, f"{tensor}: off by {off}"


@pytest.mark.parametrize(("name", "layout"), marked(every_family_in_every_kind()))
def test_four_steps_give_the_single_process_losses_norms_and_first_gradients(
    pool: WorkerPool, name: str, layout: str
) -> None:
    """Padded rows wherever the objective takes them."""
    family, _, objective = name.partition("-")
    world_size, distribution = LAYOUTS[layout]
    alone = pool.run(1, train, make_plan(family, 1, {}, objective=objective), 4)
    plan = make_plan(family, world_size, distribution, objective=objective)
    assert_parity(pool.run(world_size, train, plan, 4), alone)


@pytest.mark.parametrize("layout", ["tp2", "tp2-no-sequence", "pp2-tp2"])
@pytest.mark.parametrize("objective", ["sequence-classification", "token-classification"])
def test_an_evaluation_sees_the_loss_of_the_step_after_it(
    pool: WorkerPool, objective: str, layout: str
) -> None:
    world_size, distribution = LAYOUTS[layout]
    plan = make_plan("bert", world_size, distribution, objective=objective)
    for evaluated, trained in pool.run(world_size, evaluate_then_train, plan, 2):
        np.testing.assert_allclose(evaluated, trained, rtol=BOUND)
