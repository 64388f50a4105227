"""What a step does not do."""

from __future__ import annotations

import threading
from collections import Counter
from typing import Any
from unittest.mock import patch

import pytest

from mpsdk.backend import Place
from mpsdk.initialise import RandomSource
from mpsdk.plan import Plan
from mpsdk_tf.backend import TensorFlowBackend
from mpsdk_tf.executor import Executor
from tests.cases import global_batch, rows_of
from tests.layouts import LAYOUTS
from tests.tf import ranks
from tests.tf.cases import make_plan


def count_traces(
    place: Place, plan: Plan, steps: int, traces: dict[str, Counter[str]]
) -> list[dict[str, int]]:
    """After every step, with an evaluation before each, how often this rank's programs have been traced so far."""
    backend = TensorFlowBackend(threads=True)
    try:
        backend.build(plan, place)
        backend.load(RandomSource(plan.description, seed=0))
        seen = []
        for step in range(steps):
            batch = rows_of(global_batch(step, plan.description.vocab_size or 0), plan, place.rank)
            backend.evaluate(batch, step=step)
            backend.step(batch, step=step, learning_rate=1e-3 / (1 + step)).read()
            backend.shards()
            seen.append({program: counts[f"rank {place.rank}"] for program, counts in traces.items()})
        return seen
    finally:
        backend.close()


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("layout", ["single", "sdp2-parameters", "pp2-tp2", "pp2-sdp2-zb-v"])
def test_each_program_is_traced_once_in_a_run(layout: str, precision: str) -> None:
    world_size, distribution = LAYOUTS.get(layout, (1, {}))
    plan = make_plan("gpt2", world_size, distribution | {"precision": precision})
    traces: dict[str, Counter[str]] = {"run": Counter(), "evaluate": Counter()}

    def counted(program: str) -> Any:
        body = getattr(Executor, program)

        def traced(self: Executor, *arguments: Any, **options: Any) -> Any:
            traces[program][threading.current_thread().name] += 1
            return body(self, *arguments, **options)

        return traced

    with patch.multiple(Executor, run=counted("run"), evaluate=counted("evaluate")):
        for seen in ranks.run(world_size, count_traces, plan, 4, traces):
            assert seen[0]["run"] > 0
            assert seen[0]["evaluate"] > 0
            assert all(later == seen[0] for later in seen)
