"""Dropout masks are functions of where they stand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from mpsdk.plan import Plan
from mpsdk_tf.dropout import Moment, Site, dropout, seeds_at
from tests.cases import assemble
from tests.layouts import LAYOUTS, RECOMPUTE
from tests.tf import ranks
from tests.tf.cases import make_plan, train_each
from tests.turns import in_turn


def plan_of(layout: str, recompute: Any = "none", **training: Any) -> Plan:
    world_size, distribution = LAYOUTS.get(layout, (1, {}))
    distribution = distribution | {"activation_checkpointing": recompute}
    return make_plan("gpt2", world_size, distribution, **({"dropout": 0.1} | training))


@pytest.mark.parametrize(
    ("layout", "mode"),
    in_turn(["single", "pp2-tp2", "tp2-no-sequence", "sdp2-parameters"], tuple(RECOMPUTE)),
)
def test_recompute_on_and_off_are_bit_identical_with_dropout(layout: str, mode: str) -> None:
    """Three steps in the same layout."""
    jobs = [(plan_of(layout, each), 3) for each in ("none", RECOMPUTE[mode])]
    by_rank = ranks.run(jobs[0][0].world_size, train_each, jobs)
    kept, recomputed = map(list, zip(*by_rank, strict=True))
    assert recomputed[0].losses == kept[0].losses
    assert recomputed[0].norms == kept[0].norms
    actual, expected = (assemble([p for o in some for p in o.state]) for some in (recomputed, kept))
    for name in expected:
        np.testing.assert_array_equal(actual[name], expected[name], err_msg=name)


def test_dropout_is_applied_and_repeats_from_run_to_run() -> None:
    jobs = [(plan_of("single", dropout=rate), 3) for rate in (0.1, 0.1, 0.0)]
    first, again, without = (outcome.losses for outcome in ranks.run(1, train_each, jobs)[0])
    assert first == again
    assert first[0] != without[0]


def masks(moment: Moment, site: Site) -> np.ndarray:
    seed = seeds_at(moment, [site])[0]
    return dropout(tf.ones(1000), 0.5, seed, training=True).numpy()


HERE = Site(0, "attention", 0)


def moment_of(**fields: int) -> Moment:
    values = {"seed": 1, "step": 2, "microbatch": 3} | fields
    return Moment(values["seed"], tf.constant(values["step"]), tf.constant(values["microbatch"]))


@pytest.mark.parametrize("field", ["seed", "step", "microbatch"])
def test_every_moment_has_its_own_mask(field: str) -> None:
    first = masks(moment_of(), HERE)
    np.testing.assert_array_equal(first, masks(moment_of(), HERE))
    assert (first != masks(moment_of(**{field: 9}), HERE)).any()
    assert set(first) == {0.0, 2.0}


@pytest.mark.parametrize("site", [Site(1, "attention", 0), Site(0, "residual", 0), Site(0, "attention", 1)])
def test_every_site_has_its_own_mask(site: Site) -> None:
    assert (masks(moment_of(), HERE) != masks(moment_of(), site)).any()
