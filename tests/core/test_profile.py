"""Profiled steps: what is refused, and what is left on disk; on the numpy backend."""

from __future__ import annotations

import gzip
import json
import types
from collections.abc import Callable, Generator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from mpsdk import Estimator
from mpsdk.checkpoint import find
from mpsdk.config import Profile
from mpsdk.errors import ConfigError, DataError
from mpsdk.launch import LocalLauncher
from mpsdk.profile import (
    PROGRAM,
    MeasuredSpan,
    RankSpans,
    compress_if_large,
    machine,
    step_folder,
    trace_path,
)
from mpsdk.report.history import History
from mpsdk.report.timeline import draw_profile
from mpsdk.run import Run, draw_pictures
from mpsdk.work_order import JOB_FILE, WorkOrder
from tests.core.fake_backend import FakeBackend, FakeResult
from tests.core.jobs import MODEL, TEXT, TRAINING, order_in, work

# -- what can be asked for -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("bare", [3, [3], {"steps": 3}, {"steps": [3]}, Profile(steps=(3,))])
def test_a_step_a_list_and_a_section_say_the_same(bare: Any) -> None:
    assert Estimator(MODEL, profile=bare).profile == Profile(steps=(3,))


def test_nothing_is_profiled_unless_asked_for() -> None:
    off = Estimator(MODEL).profile
    assert off == Profile() == Profile.model_validate(None)
    assert not any(off.asks_for(step=step, rank=0) for step in range(10))


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        (
            "3",
            "profile (got '3'): must be an integer >= 1, a list of one or more, None, or a section with keys",
        ),
        (0, "profile (got 0): must be an integer >= 1"),
        (True, "profile (got True): must be an integer >= 1"),
        ({"steps": []}, "profile.steps (got []): must be an integer >= 1, a list of one or more, or None"),
        ({"steps": [3, 4, 3]}, "profile.steps (got (3, 4, 3)): has 3 more than once; name each step once"),
        ({"steps": 1, "ranks": [1, 1]}, "profile.ranks (got (1, 1)): has 1 more than once"),
        ({"steps": 1, "ranks": []}, 'must be "all" or a list of one or more integers >= 0'),
        ({"ranks": [0]}, "profile.ranks (got (0,)): has no effect without steps"),
        ({"step": 3}, "profile.step (got 3): unknown key; did you mean steps?"),
    ],
)
def test_what_no_run_could_do_is_refused_at_once(given: Any, problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Estimator(MODEL, profile=given)
    assert problem in str(caught.value)


def test_the_section_itself_says_the_same() -> None:
    with pytest.raises(ValidationError, match="has 4 more than once"):
        Profile(steps=(4, 4))


def test_steps_and_ranks_that_the_run_does_not_have_are_refused_by_the_plan() -> None:
    estimator = Estimator(
        MODEL, training=TRAINING, profile={"steps": [8, 9, 12], "ranks": [0, 2, 4]}, framework="torch"
    )
    with pytest.raises(ConfigError) as caught:
        estimator.plan(world_size=2)
    assert (
        "profile.steps (got [8, 9, 12]): names 9, 12, and training.steps is 8; name steps from 1 to 8"
        in str(caught.value)
    )
    assert (
        'profile.ranks (got [0, 2, 4]): names 2, 4, and there are 2 ranks; name ranks from 0 to 1, or "all"'
        in str(caught.value)
    )


def test_a_job_file_asks_for_it(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text("model: {model_type: gpt2}\nprofile: {steps: [3, 4], ranks: [0, 2]}\n")
    assert Estimator.from_file(tmp_path / "job.yaml").profile == Profile(steps=(3, 4), ranks=(0, 2))


def test_the_plan_is_the_same_with_and_without() -> None:
    plain, profiled = (Estimator(MODEL, training=TRAINING, profile=profile) for profile in (None, [3, 4]))
    assert plain.plan(world_size=1).hash == profiled.plan(world_size=1).hash


# -- a run ---------------------------------------------------------------------------------------------------------


def profiled(order: WorkOrder, **profile: Any) -> WorkOrder:
    return order.model_copy(update={"profile": Profile(**profile)})


def files(order: WorkOrder, step: int) -> set[str]:
    return {path.name for path in step_folder(order.output_dir, step).iterdir()}


def numbers(order: WorkOrder) -> list[tuple[int, float, float]]:
    rows = History.load(Path(order.output_dir, "history.jsonl"))
    return [(row["step"], row["loss"], row["grad_norm"]) for row in rows]


@pytest.mark.usefixtures("fake")
def test_only_the_steps_and_ranks_asked_for_are_written_and_nothing_else_changes(tmp_path: Path) -> None:
    plain = order_in(tmp_path / "plain", world_size=2, accumulation=2)
    measured = profiled(
        order_in(tmp_path / "profiled", world_size=2, accumulation=2), steps=(3, 5), ranks=(1,)
    )
    work(plain)
    work(measured)
    assert numbers(measured) == numbers(plain)
    assert [folder.name for folder in Run(tmp_path / "profiled").profiles] == [
        "step-00000003",
        "step-00000005",
    ]
    assert files(measured, 3) == {"plan.json", "rank-00001.pt.trace.json", "rank-00001.spans.json"}
    assert Run(tmp_path / "plain").profiles == []


@pytest.mark.usefixtures("fake")
def test_what_the_profiler_takes_is_not_training_time(
    tmp_path: Path, fake: type[FakeBackend], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0

    def passes(seconds: float) -> None:
        nonlocal now
        now += seconds

    class Slow:
        def __enter__(self) -> None:
            passes(100.0)

        def __exit__(self, *error: object) -> None:
            passes(100.0)

    monkeypatch.setattr("mpsdk.worker.time", types.SimpleNamespace(perf_counter=lambda: now))
    monkeypatch.setattr(fake, "before_step", staticmethod(lambda step: passes(2.0)))
    monkeypatch.setattr(fake, "profile", lambda backend, directory: Slow())
    work(profiled(order_in(tmp_path, steps=4, log_every=1), steps=(1, 3)))
    assert [row["step_seconds"] for row in History.load(tmp_path / "history.jsonl")] == [2.0] * 4


@pytest.mark.parametrize("pause", ["profile", "checkpoint", "evaluation"])
def test_what_a_device_still_has_to_do_is_training_time(
    tmp_path: Path, fake: type[FakeBackend], monkeypatch: pytest.MonkeyPatch, pause: str
) -> None:
    """Of a device that needs 2 s a step, which pass when something waits for it."""
    now = queued = 0.0

    def queue(step: int) -> None:
        nonlocal queued
        queued += 2.0

    def drain() -> None:
        nonlocal now, queued
        now, queued = now + queued, 0.0

    def draining(call: Callable[..., Any]) -> Callable[..., Any]:
        def drained(*arguments: Any, **options: Any) -> Any:
            drain()
            return call(*arguments, **options)

        return drained

    @contextmanager
    def profile(backend: FakeBackend, directory: Path | None) -> Generator[None]:
        drain()
        yield
        drain()

    monkeypatch.setattr("mpsdk.worker.time", types.SimpleNamespace(perf_counter=lambda: now))
    monkeypatch.setattr(fake, "before_step", staticmethod(queue))
    monkeypatch.setattr(fake, "profile", profile)
    for owner, name in ((fake, "evaluate"), (fake, "shards"), (FakeResult, "read"), (FakeResult, "wait")):
        monkeypatch.setattr(owner, name, draining(getattr(owner, name)))
    order = order_in(
        tmp_path,
        steps=4,
        log_every=4,
        validation=0.2,
        evaluate_every=2 if pause == "evaluation" else None,
        distribution={"checkpoint": 2} if pause == "checkpoint" else {},
    )
    work(profiled(order, steps=(3,)) if pause == "profile" else order)
    rows = History.load(tmp_path / "history.jsonl")
    assert [row["step_seconds"] for row in rows if "loss" in row] == [2.0, 2.0]


@pytest.mark.usefixtures("fake")
def test_a_step_measured_again_leaves_nothing_of_the_first_time(tmp_path: Path) -> None:
    order = order_in(tmp_path, world_size=2)
    left = step_folder(tmp_path, 2)
    left.mkdir(parents=True)
    (left / "rank-00007.spans.json").write_text("of another world")
    work(profiled(order, steps=(2,)))
    assert "rank-00007.spans.json" not in files(order, 2)
    assert "rank-00001.spans.json" in files(order, 2)


@pytest.mark.usefixtures("fake")
def test_a_run_through_the_facade_ends_with_pictures_and_goes_on_without_a_complaint(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.txt"
    corpus.write_text(TEXT, encoding="utf-8")

    def estimator(steps: int, profile: Any) -> Estimator:
        return Estimator(
            MODEL,
            framework="fake",
            training={**TRAINING, "steps": steps},
            launcher=LocalLauncher(timeout=60),
            output_dir=tmp_path / "run",
            profile=profile,
        )

    run = estimator(4, [2]).fit(str(corpus))
    (folder,) = run.profiles
    assert {path.name for path in folder.iterdir()} == {
        "plan.json",
        "rank-00000.pt.trace.json",
        "rank-00000.spans.json",
        "timeline.png",
        "timeline.svg",
    }
    drawn = (folder / "timeline.png").stat().st_mtime_ns

    with pytest.raises(ConfigError) as caught:
        estimator(6, [3, 5]).fit(str(corpus))
    assert (
        "profile.steps (got [3, 5]): names 3, and the run goes on after step 4, with which that is done"
        in str(caught.value)
    )
    # A job that was profiled before it was cut off starts again as it stands.
    run = estimator(6, [2, 5]).fit(str(corpus))
    assert [row["step"] for row in run.history] == [1, 2, 4, 6]
    assert [folder.name for folder in run.profiles] == ["step-00000002", "step-00000005"]
    assert (run.profiles[1] / "timeline.svg").exists()
    assert (folder / "timeline.png").stat().st_mtime_ns == drawn
    assert find(tmp_path / "run" / "checkpoints")


@pytest.mark.usefixtures("fake")
def test_a_step_that_was_compiled_whole_is_not_drawn(tmp_path: Path) -> None:
    order = profiled(order_in(tmp_path), steps=(1, 2))
    work(order)
    whole, folder = step_folder(tmp_path, 1), step_folder(tmp_path, 2)
    span = MeasuredSpan(kind=PROGRAM, start=1.0, end=2.0)
    RankSpans(rank=0, machine=machine(), met=0.5, spans=(span,)).save(whole)
    order.save(tmp_path / JOB_FILE)
    draw_pictures(Run(tmp_path))
    assert not (whole / "timeline.png").exists()
    assert (folder / "timeline.png").exists()
    with pytest.raises(DataError, match="compiled as one program"):
        draw_profile(whole)


# -- small things --------------------------------------------------------------------------------------------------


def test_a_large_trace_is_compressed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mpsdk.profile.LARGE", 100)
    small, large = trace_path(tmp_path, 0), trace_path(tmp_path, 1)
    small.write_text("[]")
    large.write_text(json.dumps(["x" * 200]))
    assert compress_if_large(small) == small
    compressed = compress_if_large(large)
    assert compressed.name == "rank-00001.pt.trace.json.gz" and not large.exists()
    assert json.loads(gzip.decompress(compressed.read_bytes())) == ["x" * 200]


def test_processes_of_one_machine_agree_on_its_name() -> None:
    assert machine() == machine() != ""


@pytest.mark.usefixtures("fake")
def test_the_fakes_spans_are_the_plans_actions(tmp_path: Path) -> None:
    order = profiled(order_in(tmp_path, accumulation=2), steps=(1,))
    work(order)
    folder = step_folder(tmp_path, 1)
    spans = RankSpans.load(folder / "rank-00000.spans.json").spans
    wanted = [(a.kind.value, a.stage, a.microbatch) for a in order.plan.actions(0)] * 2
    assert [(span.kind, span.stage, span.microbatch) for span in spans] == wanted
    assert all(before.end <= after.start for before, after in pairwise(spans))
    assert len(json.loads(trace_path(folder, 0).read_text())["traceEvents"]) == len(wanted)
