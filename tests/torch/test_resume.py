"""Stop and go on: bit for bit in the same layout, within the design's bounds in another."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mpsdk.backend import Place
from mpsdk.checkpoint import Checkpoint, commit, step_directory, write_rank
from mpsdk.plan import Plan
from tests.cases import BOUND, Outcome, assemble
from tests.layouts import FAMILIES, LAYOUTS
from tests.torch.cases import make_plan, train
from tests.torch.pool import WorkerPool
from tests.turns import in_turn, one_in

TOTAL, HALF = 6, 3
LAYOUTS_HERE = LAYOUTS | {
    "single": (1, {}),
    "sdp4": (4, {"sharded_data_parallel": 4}),
    "sdp3": (3, {"sharded_data_parallel": 3}),
}
PAIRS = [
    ("pp2-tp2", "sdp4"), ("sdp4", "pp2-tp2"), ("single", "pp2-sdp2-tp2"), ("pp2-sdp2-tp2", "single"),
    ("tp4", "pp4"), ("pp4", "dp2-sdp2"), ("dp2", "tp4"), ("sdp2-optimizer", "pp2-tp2"),
]  # fmt: skip
ROUND_TRIP = ["single", "dp2", "sdp2-parameters", "pp2-tp2", "pp2-sdp2-tp2"]


def plan_of(layout: str, family: str = "gpt2") -> Plan:
    world_size, distribution = LAYOUTS_HERE[layout]
    batch = {"global_batch": 24} if layout == "sdp3" else {}
    return make_plan(family, world_size, distribution, steps=TOTAL, **batch)


def train_and_write(place: Place, plan: Plan, steps: int, root: str) -> tuple[Outcome, dict]:
    from mpsdk_torch import checkpoint

    parts: list[dict] = []
    state_of = checkpoint.rank_state

    def writing(optimizer, *, writes):
        state = state_of(optimizer, writes=writes)
        parts.append(write_rank(step_directory(root, steps, "test"), place.rank, state))
        return state

    import mpsdk_torch.backend as backend

    backend.rank_state = writing
    try:
        return train(place, plan, steps, gradients=False), parts[0]
    finally:
        backend.rank_state = state_of


def go_on(place: Place, plan: Plan, path: str, steps: int) -> Outcome:
    checkpoint = Checkpoint.open(path)
    return train(place, plan, steps, source=checkpoint, start=checkpoint.step, gradients=False)


def save(pool: WorkerPool, plan: Plan, root: Path, steps: int = HALF) -> str:
    answers = pool.run(plan.world_size, train_and_write, plan, steps, str(root))
    meta = {
        "step": steps, "samples_consumed": steps * plan.training.global_batch, "framework": "torch",
        "plan": plan.model_dump(mode="json"), "plan_hash": plan.hash,
    }  # fmt: skip
    final = step_directory(root, steps)
    commit(step_directory(root, steps, "test"), final, [part for _, part in answers], meta)
    return str(final)


@pytest.mark.parametrize("layout", ROUND_TRIP)
def test_stop_and_resume_in_the_same_layout_is_bit_identical(
    pool: WorkerPool, layout: str, tmp_path: Path
) -> None:
    plan = plan_of(layout)
    whole = pool.run(plan.world_size, train, plan, TOTAL)
    resumed = pool.run(plan.world_size, go_on, plan, save(pool, plan, tmp_path), TOTAL - HALF)
    assert resumed[0].losses == whole[0].losses[HALF:]
    assert resumed[0].norms == whole[0].norms[HALF:]
    assert resumed[0].scalars == whole[0].scalars
    actual, expected = (assemble([p for o in some for p in o.state]) for some in (resumed, whole))
    assert actual.keys() == expected.keys()
    for name in expected:
        np.testing.assert_array_equal(actual[name], expected[name], err_msg=name)


@pytest.mark.parametrize(("before", "after", "family"), one_in(2, in_turn(PAIRS, FAMILIES)))
def test_saved_in_one_layout_and_resumed_in_another_gives_the_same_losses(
    pool: WorkerPool, before: str, after: str, family: str, tmp_path: Path
) -> None:
    first, second = plan_of(before, family), plan_of(after, family)
    whole = pool.run(first.world_size, train, first, TOTAL)
    resumed = pool.run(second.world_size, go_on, second, save(pool, first, tmp_path), TOTAL - HALF)
    np.testing.assert_allclose(resumed[0].losses, whole[0].losses[HALF:], rtol=BOUND)
    np.testing.assert_allclose(resumed[0].norms, whole[0].norms[HALF:], rtol=BOUND)


def test_a_checkpoint_passes_unchanged_through_a_layout_with_uneven_shards(
    pool: WorkerPool, tmp_path: Path
) -> None:
    plan = plan_of("pp2-tp2")
    path = save(pool, plan, tmp_path)
    uneven = plan_of("sdp3")
    outcomes = pool.run(3, go_on, uneven, path, 0)
    source = Checkpoint.open(path)
    for name, values in assemble([p for o in outcomes for p in o.state]).items():
        slot, _, tensor = name.partition("/")
        np.testing.assert_array_equal(
            values, source.read(tensor, slot, (0,) * values.ndim, values.shape), err_msg=name
        )
