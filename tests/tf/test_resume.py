"""Stop and go on: bit for bit in the same layout, within the design's bounds in another."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest

from mpsdk.backend import Place, RankState, Shard
from mpsdk.checkpoint import Checkpoint, commit, step_directory, write_rank
from mpsdk.plan import Plan
from tests.cases import BOUND, Outcome, Piece, assemble
from tests.layouts import FAMILIES, LAYOUTS
from tests.tf import ranks
from tests.tf.cases import make_plan, train, train_only
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


@cache
def whole(layout: str, family: str = "gpt2") -> list[Outcome]:
    """An uninterrupted run."""
    plan = plan_of(layout, family)
    return ranks.run(plan.world_size, train_only, plan, TOTAL)


def go_on(place: Place, plan: Plan, path: str, steps: int) -> Outcome:
    checkpoint = Checkpoint.open(path)
    return train(place, plan, steps, source=checkpoint, start=checkpoint.step, gradients=False)


def save(plan: Plan, root: Path, steps: int = HALF) -> str:
    """Train, and write what each rank has to write; the committed checkpoint."""
    outcomes = ranks.run(plan.world_size, train_only, plan, steps)
    draft = step_directory(root, steps, "test")
    parts = [
        write_rank(draft, rank, RankState([_shard(piece) for piece in outcome.state], outcome.scalars))
        for rank, outcome in enumerate(outcomes)
    ]
    meta = {
        "step": steps, "samples_consumed": steps * plan.training.global_batch, "framework": "tensorflow",
        "plan": plan.model_dump(mode="json"), "plan_hash": plan.hash,
    }  # fmt: skip
    final = step_directory(root, steps)
    commit(draft, final, parts, meta)
    return str(final)


def _shard(piece: Piece) -> Shard:
    (slot, _, name), (_, global_shape, offset, values) = piece[0].partition("/"), piece
    return Shard(name, slot, global_shape, offset, values.shape, read=lambda: values)


@pytest.mark.parametrize("layout", ROUND_TRIP)
def test_stop_and_resume_in_the_same_layout_is_bit_identical(layout: str, tmp_path: Path) -> None:
    plan, expected = plan_of(layout), whole(layout)
    resumed = ranks.run(plan.world_size, go_on, plan, save(plan, tmp_path), TOTAL - HALF)
    assert resumed[0].losses == expected[0].losses[HALF:]
    assert resumed[0].norms == expected[0].norms[HALF:]
    assert resumed[0].scalars == expected[0].scalars
    actual, wanted = (assemble([p for o in some for p in o.state]) for some in (resumed, expected))
    assert actual.keys() == wanted.keys()
    for name in wanted:
        np.testing.assert_array_equal(actual[name], wanted[name], err_msg=name)


@pytest.mark.parametrize(("before", "after", "family"), one_in(2, in_turn(PAIRS, FAMILIES)))
def test_saved_in_one_layout_and_resumed_in_another_gives_the_same_losses(
    before: str, after: str, family: str, tmp_path: Path
) -> None:
    first, second = plan_of(before, family), plan_of(after, family)
    expected = whole(before, family)
    resumed = ranks.run(second.world_size, go_on, second, save(first, tmp_path), TOTAL - HALF)
    np.testing.assert_allclose(resumed[0].losses, expected[0].losses[HALF:], rtol=BOUND)
    np.testing.assert_allclose(resumed[0].norms, expected[0].norms[HALF:], rtol=BOUND)


def test_a_checkpoint_passes_unchanged_through_a_layout_with_uneven_shards(tmp_path: Path) -> None:
    path = save(plan_of("pp2-tp2"), tmp_path)
    outcomes = ranks.run(3, go_on, plan_of("sdp3"), path, 0)
    source = Checkpoint.open(path)
    for name, values in assemble([p for o in outcomes for p in o.state]).items():
        slot, _, tensor = name.partition("/")
        np.testing.assert_array_equal(
            values, source.read(tensor, slot, (0,) * values.ndim, values.shape), err_msg=name
        )
