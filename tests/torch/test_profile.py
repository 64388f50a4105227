"""A profiled step on real ranks: its trace, its spans, and that it trains what an unprofiled one does."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import pytest

from mpsdk.backend import Place
from mpsdk.initialise import RandomSource
from mpsdk.plan import Plan
from mpsdk.profile import (
    REDUCTION,
    SENDS,
    TOKEN_COUNT,
    UPDATE,
    WAIT,
    RankSpans,
    measured_ranks,
    spans_path,
    trace_path,
)
from mpsdk.report.timeline import ProfiledStep, draw_profile
from mpsdk.schedule import COMPUTE, RECEIVES, Action, Kind
from tests.cases import global_batch, rows_of
from tests.torch.cases import make_plan
from tests.torch.pool import WorkerPool

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "dp2": (2, {}),
    "pp2": (2, {"pipeline": {"degree": 2, "microbatches": 4}}),
    "pp2-tp2": (4, {"pipeline": {"degree": 2, "microbatches": 4}, "tensor_parallel": 2}),
    "pp2-sdp2 zb-v": (
        4,
        {
            "pipeline": {"degree": 2, "microbatches": 4, "schedule": "zb-v", "virtual_stages": 2},
            "sharded_data_parallel": 2,
        },
    ),
}
PROFILED = 1  # of the steps from 0


def outcomes(place: Place, plan: Plan, directory: Path, ranks: tuple[int, ...]) -> list[list[float]]:
    """Losses and norms of three steps, and of three in which these `ranks` profile the middle one."""
    again = replace(place, store=f"{place.store}-again")
    return [train(place, plan), train(again, plan, lambda: directory if place.rank in ranks else None)]


def train(place: Place, plan: Plan, measure: Callable[[], Path | None] | None = None) -> list[float]:
    from mpsdk_torch.backend import TorchBackend

    backend = TorchBackend()
    values: list[float] = []
    try:
        backend.build(plan, place)
        backend.load(RandomSource(plan.description, plan.training.seed))
        for step in range(3):
            batch = rows_of(global_batch(step, plan.description.vocab_size or 0), plan, place.rank)
            measuring = backend.profile(measure()) if measure and step == PROFILED else nullcontext()
            with measuring:
                result = backend.step(batch, step=step, learning_rate=1e-3)
            read = result.read()
            values += [read["loss"], read["grad_norm"]]
        return values
    finally:
        backend.close()


@dataclass(frozen=True)
class Profiled:
    plan: Plan
    directory: Path
    plain: list[list[float]]  # by rank
    profiled: list[list[float]]


@pytest.fixture(scope="module", params=LAYOUTS)
def step(
    request: pytest.FixtureRequest, pool: WorkerPool, tmp_path_factory: pytest.TempPathFactory
) -> Profiled:
    """A step of two passes over four microbatches, profiled on all ranks."""
    world_size, distribution = LAYOUTS[request.param]
    plan = make_plan("gpt2", world_size, distribution)
    directory = tmp_path_factory.mktemp("profile") / "step-00000002"
    directory.mkdir()
    plan.save(directory / "plan.json")
    plain, profiled = zip(
        *pool.run(world_size, outcomes, plan, directory, tuple(range(world_size))), strict=True
    )
    return Profiled(plan, directory, list(plain), list(profiled))


def spans_of(step: Profiled, rank: int) -> RankSpans:
    return RankSpans.load(spans_path(step.directory, rank))


def test_what_is_learned_is_the_same_bit_for_bit(step: Profiled) -> None:
    assert step.profiled == step.plain


def test_the_spans_are_the_plans_actions_in_the_plans_order(step: Profiled) -> None:
    for rank in range(step.plan.world_size):
        spans = spans_of(step, rank).spans
        ran = [
            (span.part, Action(Kind(span.kind), span.stage, span.microbatch))
            for span in spans
            if span.stage is not None and span.microbatch is not None and span.kind != WAIT
        ]
        assert ran == [(part, action) for part in range(2) for action in step.plan.actions(rank)]
        phases = [kind for kind, _ in groupby(span.kind if span.stage is None else "" for span in spans)]
        assert phases == [TOKEN_COUNT, "", SENDS, "", SENDS, REDUCTION, UPDATE]


def test_the_spans_of_a_rank_do_not_overlap_and_lie_after_the_barrier(step: Profiled) -> None:
    for rank in range(step.plan.world_size):
        measured = spans_of(step, rank)
        assert measured.met <= measured.spans[0].start
        assert all(span.start <= span.end for span in measured.spans)
        assert all(before.end <= after.start for before, after in pairwise(measured.spans))


def test_a_wait_stands_before_each_action_that_uses_a_message(step: Profiled) -> None:
    for rank in range(step.plan.world_size):
        received = Counter(action.kind for action in step.plan.actions(rank) if action.kind in RECEIVES)
        waits = 0
        for before, after in pairwise(spans_of(step, rank).spans):
            if before.kind == WAIT:
                waits += 1
                assert (before.stage, before.microbatch, before.part) == (
                    after.stage,
                    after.microbatch,
                    after.part,
                )
                assert Kind(after.kind) in COMPUTE
        assert waits == 2 * received.total()
        assert (waits > 0) == (step.plan.degrees.pp > 1)


def test_messages_arrive_after_they_were_sent(step: Profiled) -> None:
    """Clocks of the ranks of one machine are one: no wait is over before the message's stage has computed it."""
    spans = {rank: spans_of(step, rank).spans for rank in range(step.plan.world_size)}
    topology = step.plan.topology
    for rank, own in spans.items():
        line = topology.group(rank, ("pp",))
        for wait, used in pairwise(own):
            if wait.kind != WAIT or wait.stage is None:
                continue
            kinds, source = ({"F"}, wait.stage - 1) if used.kind == "F" else ({"B", "I"}, wait.stage + 1)
            owner = line[step.plan.schedule.stage_rank[source]]
            (made,) = [
                span
                for span in spans[owner]
                if span.kind in kinds
                and (span.stage, span.microbatch, span.part) == (source, wait.microbatch, wait.part)
            ]
            assert made.end <= wait.end


def test_a_trace_has_a_range_for_every_action_and_phase(step: Profiled) -> None:
    for rank in range(step.plan.world_size):
        events = json.loads(trace_path(step.directory, rank).read_text())["traceEvents"]
        ranges = Counter(event["name"] for event in events if event.get("cat") == "user_annotation")
        actions = Counter(str(action) for action in step.plan.actions(rank) for _ in range(2))
        assert {name: count for name, count in ranges.items() if name in actions} == actions
        waits = {name for name in ranges if name.startswith(WAIT)}
        assert waits == {f"wait {action}" for action in step.plan.actions(rank) if action.kind in RECEIVES}
        assert [ranges[name] for name in (TOKEN_COUNT, SENDS, REDUCTION, UPDATE)] == [1, 2, 1, 1]
        assert any(event["name"] == "aten::mm" for event in events)


def test_the_picture_is_drawn_of_what_was_measured(step: Profiled) -> None:
    png, svg = draw_profile(step.directory)
    measured = ProfiledStep.load(step.directory)
    assert png.stat().st_size > 10_000 and svg.stat().st_size > 10_000
    assert len(measured.executed) == step.plan.world_size
    assert measured.makespan > 0
    assert 0 < measured.bubble_fraction < 1
    assert measured.simulated.makespan > 0


def test_ranks_that_are_not_asked_leave_nothing(pool: WorkerPool, tmp_path: Path) -> None:
    plan = make_plan("gpt2", 2, LAYOUTS["pp2"][1])
    ((plain, profiled), _) = pool.run(2, outcomes, plan, tmp_path, (1,))
    assert profiled == plain
    assert measured_ranks(tmp_path) == [1]
    assert {path.name for path in tmp_path.iterdir()} == {"rank-00001.pt.trace.json", "rank-00001.spans.json"}
