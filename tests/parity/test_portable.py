"""One checkpoint through every ordered pair of framework and layout: bit for bit what it was, moments included."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mpsdk.checkpoint import Checkpoint, commit, step_directory
from mpsdk.plan import Plan
from tests.cases import make_plan
from tests.parity import tensorflow_side
from tests.torch.cases import pass_on
from tests.torch.pool import WorkerPool

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tp2": (2, {"tensor_parallel": 2}),
    "pp2-tp2": (4, {"pipeline": {"degree": 2, "microbatches": 2}, "tensor_parallel": 2}),
    "sdp4": (4, {"sharded_data_parallel": 4}),
    "dp2": (2, {}),
}
STATIONS = list(product(("torch", "tensorflow"), LAYOUTS))
SLOTS = ("weight", "exp_avg", "exp_avg_sq")


def round_trip(stations: Sequence[Any]) -> Iterator[Any]:
    """A walk from the first station back to it that goes each way between any two exactly once (Hierholzer 1873)."""
    ways = {here: [there for there in stations if there != here] for here in stations}
    walk, path = [stations[0]], []
    while walk:
        if ways[walk[-1]]:
            walk.append(ways[walk[-1]].pop())
        else:
            path.append(walk.pop())
    return reversed(path)


def meta_of(plan: Plan, step: int) -> dict[str, object]:
    description = plan.description
    return {
        "step": step,
        "samples_consumed": 0,
        "framework": plan.framework,
        "plan": plan.model_dump(mode="json"),
        "plan_hash": plan.hash,
        "naming": description.naming,
        "tied": {tensor.name: tensor.tied_to for tensor in description.tensors() if tensor.tied_to},
    }


def test_the_round_trip_goes_every_way_once() -> None:
    path = list(round_trip("abcd"))
    assert sorted(pairwise(path)) == sorted((a, b) for a, b in product("abcd", "abcd") if a != b)


@pytest.mark.parametrize(
    ("family", "objective"),
    [("llama", "causal-lm"), pytest.param("bert", "masked-lm", marks=pytest.mark.long)],
)
def test_a_checkpoint_comes_back_bit_for_bit_from_every_way_between_two_layouts(
    pool: WorkerPool, tensorflow: ProcessPoolExecutor, family: str, objective: str, tmp_path: Path
) -> None:
    """56 ways between eight stations."""
    settings = {} if objective == "causal-lm" else {"objective": objective}

    def plan_of(framework: str, layout: str) -> Plan:
        world_size, distribution = LAYOUTS[layout]
        return make_plan(family, world_size, distribution, framework=framework, **settings)

    source: str | None = None
    first: dict[tuple[str, str], Any] = {}
    for number, (framework, layout) in enumerate(round_trip(STATIONS)):
        plan, unfinished = plan_of(framework, layout), step_directory(tmp_path, number, "a")
        if framework == "torch":
            parts = pool.run(plan.world_size, pass_on, plan, source, unfinished)
        else:
            parts = tensorflow.submit(tensorflow_side.pass_on, plan, source, unfinished).result()
        final = step_directory(tmp_path, number)
        commit(unfinished, final, parts, meta_of(plan, number))
        checkpoint = Checkpoint.open(final)
        checkpoint.verify()
        state = {
            (tensor.name, slot): checkpoint.read(tensor.name, slot, (0,) * len(tensor.shape), tensor.shape)
            for tensor in plan.description.tensors()
            if tensor.tied_to is None
            for slot in SLOTS
        }
        first = first or state
        assert checkpoint.scalars["optimizer_step"] == 2
        for name, values in first.items():
            np.testing.assert_array_equal(state[name], values, err_msg=f"{name} after {framework} {layout}")
        source = final
