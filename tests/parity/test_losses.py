"""Thirty steps in PyTorch and in TensorFlow under the same plan: the same losses, step for step."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pytest

from tests.cases import make_plan
from tests.layouts import FAMILIES, LAYOUTS
from tests.parity import tensorflow_side
from tests.torch.cases import train
from tests.torch.pool import WorkerPool
from tests.turns import in_turn

BOUND = 1e-4
STEPS = 30
WITH_BOTH = ["single", "sdp2-parameters", "tp2", "pp2-tp2"]
BY_TURNS = ["pp2-sdp2-interleaved", "pp2-tp2-zb-h1", "pp2-sdp2-zb-v", "pp2-sdp2-tp2"]
CASES = [
    *(pytest.param(layout, family, id=f"{layout}-{family}") for layout in WITH_BOTH for family in FAMILIES),
    *in_turn(BY_TURNS, FAMILIES),
]


@pytest.mark.parametrize(("layout", "family"), CASES)
def test_thirty_steps_give_the_same_losses_in_both_frameworks(
    pool: WorkerPool, tensorflow: ProcessPoolExecutor, family: str, layout: str
) -> None:
    world_size, distribution = LAYOUTS.get(layout, (1, {}))
    ours, theirs = (
        make_plan(family, world_size, distribution, framework=framework, steps=STEPS)
        for framework in ("torch", "tensorflow")
    )
    assert ours.model_copy(update={"framework": "tensorflow"}) == theirs
    answer = tensorflow.submit(tensorflow_side.train, theirs, STEPS)
    expected = pool.run(world_size, train, ours, STEPS)[0]
    outcome = answer.result()
    assert expected.losses[-1] < 0.9 * expected.losses[0], "there must be something to agree on"
    np.testing.assert_allclose(outcome.losses, expected.losses, rtol=BOUND)
    np.testing.assert_allclose(outcome.norms, expected.norms, rtol=BOUND)
