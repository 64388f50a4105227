"""bf16 and fp16 mixed precision, and the dynamic loss scale."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from mpsdk.config import Precision
from mpsdk_tf.precision import LossScale
from tests.cases import assemble
from tests.layouts import LAYOUTS
from tests.tf import ranks
from tests.tf.cases import make_plan, train
from tests.tf.test_parity import reference
from tests.turns import in_turn

MIXED = ["single", "dp2", "sdp2-tp2", "pp2-tp2", "pp2-sdp2-tp2", "pp2-sdp2-zb-h1", "pp2-sdp2-zb-v"]


@pytest.mark.parametrize(("layout", "mode"), in_turn(MIXED, ("bf16", "fp16")))
def test_mixed_precision_follows_fp32_to_its_own_rounding(layout: str, mode: str) -> None:
    world_size, distribution = LAYOUTS.get(layout, (1, {}))
    plan = make_plan("gpt2", world_size, distribution | {"precision": mode})
    outcomes = ranks.run(world_size, train, plan, 10)
    rounding = {"bf16": 2.0**-8, "fp16": 2.0**-11}[mode]
    expected = reference("gpt2", 10)[0]
    np.testing.assert_allclose(outcomes[0].losses, expected.losses, rtol=rounding)
    np.testing.assert_allclose(outcomes[0].norms, expected.norms, rtol=16 * rounding)
    assert outcomes[0].losses != expected.losses, "the precision must make some difference"
    assert all(piece[3].dtype == np.float32 for outcome in outcomes for piece in outcome.state)


def test_a_step_that_overflows_is_skipped_and_halves_the_scale() -> None:
    precision = {"mode": "fp16", "initial_loss_scale": 2.0**40}
    world_size, distribution = LAYOUTS["pp2-sdp2-tp2"]
    plan = make_plan("gpt2", world_size, distribution | {"precision": precision})
    before, after = (ranks.run(world_size, train, plan, steps) for steps in (0, 2))
    scalars = after[0].scalars
    assert scalars["loss_scale"] == 2.0**38
    assert scalars["optimizer_step"] == 0
    assert all(outcome.scalars == scalars for outcome in after)
    untouched, weights = (assemble([p for o in some for p in o.state]) for some in (before, after))
    for name in untouched:
        np.testing.assert_array_equal(weights[name], untouched[name], err_msg=name)


def test_the_scale_doubles_after_enough_good_steps_in_a_row() -> None:
    scale = LossScale(Precision(mode="fp16", initial_loss_scale=8.0, loss_scale_growth_interval=3))
    seen = []
    for overflowed in (False, False, True, False, False, False, False):
        scale.update(tf.constant(overflowed))
        seen.append(float(scale.scale))
    assert seen == [8.0, 8.0, 4.0, 4.0, 4.0, 8.0, 8.0]
