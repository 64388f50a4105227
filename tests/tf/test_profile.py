"""A profiled step on real ranks: its trace, its spans, and that it trains what an unprofiled one does."""

from __future__ import annotations

import json
import multiprocessing
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from mpsdk import Estimator
from mpsdk.backend import Place
from mpsdk.errors import BackendError, DataError
from mpsdk.initialise import RandomSource
from mpsdk.plan import Plan
from mpsdk.profile import (
    PROGRAM,
    REDUCTION,
    SENDS,
    TOKEN_COUNT,
    UPDATE,
    WAIT,
    RankSpans,
    spans_path,
    trace_path,
)
from mpsdk.report.timeline import ProfiledStep, draw_profile, has_actions
from mpsdk.schedule import COMPUTE, RECEIVES, Action, Kind
from mpsdk_tf.backend import TensorFlowBackend
from tests.cases import global_batch, rows_of
from tests.layouts import LAYOUTS
from tests.tf.cases import make_plan

SMALL = {"n_embd": 16, "n_head": 2}
PROFILED = 1  # of the steps from 0
BY_DEFAULT, LONG = ("dp2", "pp2-zb-v"), ("sdp2-parameters", "tp2", "pp2")
MEASURED = [*BY_DEFAULT, *(pytest.param(layout, marks=pytest.mark.long) for layout in LONG)]

Ranks = list[ProcessPoolExecutor]


@dataclass(frozen=True)
class Trained:
    """Losses and norms of three steps, and how often the program of a step was traced."""

    values: list[float]
    traces: int


def outcomes(rank: int, store: str, plan: Plan, directory: Path) -> tuple[Trained, Trained]:
    """A short training, and the same with its middle step profiled."""
    place = Place(rank=rank, local_rank=rank, world_size=2, store=store, timeout=120.0)
    return train(place, plan), train(replace(place, store=f"{store}-again"), plan, directory)


def train(place: Place, plan: Plan, directory: Path | None = None) -> Trained:
    backend = TensorFlowBackend()
    values: list[float] = []
    try:
        backend.build(plan, place)
        backend.load(RandomSource(plan.description, plan.training.seed))
        for step in range(3):
            batch = rows_of(global_batch(step, plan.description.vocab_size or 0), plan, place.rank)
            with backend.profile(directory) if directory and step == PROFILED else nullcontext():
                result = backend.step(batch, step=step, learning_rate=1e-3)
            read = result.read()
            values += [read["loss"], read["grad_norm"]]
        return Trained(values, backend._ready.trainer.train_program.experimental_get_tracing_count())
    finally:
        backend.close()


@pytest.fixture(scope="module")
def processes() -> Iterator[Ranks]:
    """Two ranks, each a process that stays."""
    with ExitStack() as stack:
        spawn = multiprocessing.get_context("spawn")
        yield [stack.enter_context(ProcessPoolExecutor(1, mp_context=spawn)) for _ in range(2)]


@dataclass(frozen=True)
class Profiled:
    plan: Plan
    directory: Path
    trained: list[tuple[Trained, Trained]]  # by rank: plain, profiled


@pytest.fixture(scope="module", params=MEASURED)
def step(
    request: pytest.FixtureRequest, processes: Ranks, tmp_path_factory: pytest.TempPathFactory
) -> Profiled:
    """A step of two passes, profiled on both ranks."""
    _, distribution = LAYOUTS[request.param]
    plan = make_plan("gpt2", 2, distribution, model=SMALL)
    folder = tmp_path_factory.mktemp("profile")
    directory = folder / "step-00000002"
    directory.mkdir()
    plan.save(directory / "plan.json")
    futures = [
        process.submit(outcomes, rank, str(folder / "store"), plan, directory)
        for rank, process in enumerate(processes)
    ]
    return Profiled(plan, directory, [future.result(timeout=240) for future in futures])


def spans_of(step: Profiled, rank: int) -> RankSpans:
    return RankSpans.load(spans_path(step.directory, rank))


def action_of(span: Any) -> Action:
    return Action(Kind(span.kind), span.stage, span.microbatch)


def test_what_is_learned_is_the_same_bit_for_bit_by_a_program_traced_once(step: Profiled) -> None:
    for plain, profiled in step.trained:
        assert profiled.values == plain.values
        assert profiled.traces == plain.traces == 1


def test_the_spans_are_the_plans_actions_and_those_that_compute_in_its_order(step: Profiled) -> None:
    for rank in range(2):
        spans = [span for span in spans_of(step, rank).spans if span.stage is not None and span.kind != WAIT]
        planned = [(part, action) for part in range(2) for action in step.plan.actions(rank)]
        assert Counter((span.part, action_of(span)) for span in spans) == Counter(planned)
        computed = [(span.part, action_of(span)) for span in spans if span.kind in COMPUTE]
        assert computed == [(part, action) for part, action in planned if action.kind in COMPUTE]


def test_every_action_that_computes_takes_time(step: Profiled) -> None:
    for rank in range(2):
        assert all(span.end > span.start for span in spans_of(step, rank).spans if span.kind in COMPUTE)


def test_phases_stand_where_they_belong(step: Profiled) -> None:
    for rank in range(2):
        phases = [span.kind for span in spans_of(step, rank).spans if span.stage is None]
        assert Counter(phases) == {TOKEN_COUNT: 1, SENDS: 2, REDUCTION: 1, UPDATE: 1}
        assert [kind for kind in phases if kind != TOKEN_COUNT] == [SENDS, SENDS, REDUCTION, UPDATE]
        of = {span.kind: span.end - span.start for span in spans_of(step, rank).spans}
        assert of[UPDATE] > 0
        assert (of[REDUCTION] > 0) == (step.plan.data_size > 1)


def test_what_a_rank_computes_and_waits_for_does_not_overlap_and_lies_after_the_meeting(
    step: Profiled,
) -> None:
    for rank in range(2):
        measured = spans_of(step, rank)
        assert all(measured.met <= span.start <= span.end for span in measured.spans)
        spans = [span for span in measured.spans if span.kind in {*COMPUTE, WAIT, SENDS, REDUCTION, UPDATE}]
        assert all(before.end <= after.start for before, after in pairwise(spans))


def test_a_wait_stands_before_each_action_that_uses_a_message(step: Profiled) -> None:
    for rank in range(2):
        received = Counter(action.kind for action in step.plan.actions(rank) if action.kind in RECEIVES)
        spans = [span for span in spans_of(step, rank).spans if span.kind in {*COMPUTE, WAIT}]
        waits = [(before, after) for before, after in pairwise(spans) if before.kind == WAIT]
        for wait, used in waits:
            assert (wait.stage, wait.microbatch, wait.part) == (used.stage, used.microbatch, used.part)
            assert used.kind in {"F", "B", "I"}
        assert len(waits) == 2 * received.total()
        assert (len(waits) > 0) == (step.plan.degrees.pp > 1)


def test_messages_arrive_after_they_were_computed(step: Profiled) -> None:
    """Clocks of the ranks of one machine are one."""
    spans = {rank: spans_of(step, rank).spans for rank in range(2)}
    for own in spans.values():
        for message in own:
            if message.kind not in RECEIVES:
                continue
            kinds = {"F"} if message.kind == Kind.RECEIVE_FORWARD else {"B", "I"}
            assert message.stage is not None
            source = message.stage + (-1 if kinds == {"F"} else 1)
            (made,) = [
                span
                for span in spans[step.plan.schedule.stage_rank[source]]
                if span.kind in kinds
                and (span.stage, span.microbatch, span.part) == (source, message.microbatch, message.part)
            ]
            assert made.end <= message.end


def test_a_trace_has_a_range_for_every_action_and_phase(step: Profiled) -> None:
    for rank in range(2):
        events = json.loads(trace_path(step.directory, rank).read_text())["traceEvents"]
        ranges = Counter(event["name"] for event in events if event.get("cat") == "user_annotation")
        actions = Counter(str(action) for action in step.plan.actions(rank) for _ in range(2))
        waits = {f"wait {action}": 2 for action in step.plan.actions(rank) if action.kind in RECEIVES}
        phases = {TOKEN_COUNT: 1, SENDS: 2, REDUCTION: 1, UPDATE: 1}
        assert ranges == actions | Counter(waits) | Counter(phases)
        assert any("MatMul" in event["name"] for event in events if event.get("cat") == "cpu_op")
        lines: dict[int, float] = {}
        for event in sorted(events, key=lambda event: event.get("ts", 0.0)):
            if event.get("cat") == "user_annotation":
                assert event["ts"] >= lines.get(event["tid"], 0.0) - 0.01  # microseconds
                lines[event["tid"]] = event["ts"] + event["dur"]


def test_the_picture_is_drawn_of_what_was_measured(step: Profiled) -> None:
    png, svg = draw_profile(step.directory)
    measured = ProfiledStep.load(step.directory)
    assert png.stat().st_size > 10_000 and svg.stat().st_size > 10_000
    assert len(measured.executed) == 2
    assert 0 < measured.bubble_fraction < 1
    assert measured.simulated.makespan > 0


def test_a_step_compiled_whole_has_no_actions_and_says_so(tmp_path: Path) -> None:
    plan = make_plan("gpt2", 1, {"compile": True}, model=SMALL | {"n_layer": 1}, accumulation=1)
    plan.save(tmp_path / "plan.json")
    train(Place(rank=0, world_size=1), plan, tmp_path)
    (span,) = RankSpans.load(spans_path(tmp_path, 0)).spans
    assert (span.kind, span.stage) == (PROGRAM, None)
    assert span.end > span.start
    assert not has_actions(tmp_path)
    with pytest.raises(DataError, match="compiled as one program"):
        draw_profile(tmp_path)


def test_ranks_that_are_threads_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match="share one profiler"):
        TensorFlowBackend(threads=True).profile(tmp_path)


def test_a_run_profiles_the_ranks_that_it_is_asked_for_and_draws_them(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 60, encoding="utf-8")
    run = Estimator(
        {"model_type": "gpt2", "vocab_size": 257, "n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 2},
        framework="tensorflow",
        distribution={"pipeline": {"degree": 2, "microbatches": 2}},
        training={
            "steps": 3,
            "global_batch": 4,
            "sequence_length": 16,
            "tokenizer": "bytes",
            "dropout": 0.0,
        },
        output_dir=tmp_path / "run",
        profile={"steps": 2, "ranks": [1]},
    ).fit(text)
    (folder,) = run.profiles
    assert {path.name for path in folder.iterdir()} == {
        "plan.json",
        "rank-00001.pt.trace.json",
        "rank-00001.spans.json",
        "timeline.png",
        "timeline.svg",
    }
    assert ProfiledStep.load(folder).ranks == (1,)
    assert ProfiledStep.load(folder).stages_not_measured == [0]
