"""The training loop, driven by a numpy backend that the core knows nothing of."""

from __future__ import annotations

import itertools
import math
import os
import shutil
import signal
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mpsdk.checkpoint import Checkpoint, find
from mpsdk.errors import CheckpointError, ConfigError, WorkerError
from mpsdk.launch.control import request_stop
from mpsdk.report.history import History
from mpsdk.resume import expected_checkpoint
from mpsdk.work_order import WorkOrder
from tests.core.fake_backend import FakeBackend
from tests.core.jobs import order_in, work

pytestmark = pytest.mark.usefixtures("fake")

TIMINGS = ("tokens_per_second", "step_seconds")
EVERY_4 = {"checkpoint": {"every": 4}}


def history_of(order: WorkOrder) -> list[dict[str, Any]]:
    """The run's rows without the clock's."""
    rows = History.load(Path(order.output_dir, "history.jsonl"))
    return [{name: value for name, value in row.items() if name not in TIMINGS} for row in rows]


def losses(order: WorkOrder) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in history_of(order) if "loss" in row}


def newest(order: WorkOrder) -> Checkpoint:
    return Checkpoint.open(find(order.checkpoints)[0])


def tensors_of(checkpoint: Checkpoint) -> dict[str, bytes]:
    return {
        f"{slot}/{name}": checkpoint.read(name, slot, (0,) * len(shape), shape).tobytes()
        for slot in checkpoint.slots
        for name, shape in checkpoint.shapes(slot).items()
    }


def kinds(events: list[dict[str, Any]]) -> list[tuple[str, int]]:
    return [(event["event"], event["step"]) for event in events]


# -- a run from its first step to its last -------------------------------------------------------------------------


def test_a_run_trains_evaluates_saves_and_says_so(tmp_path: Path) -> None:
    order = order_in(tmp_path, steps=8, validation=0.2, evaluate_every=4, distribution=EVERY_4)
    events = work(order)
    assert kinds(events) == [
        ("start", 0),
        ("log", 1),
        ("log", 2),
        ("log", 4),
        ("evaluate", 4),
        ("checkpoint", 4),
        ("log", 6),
        ("log", 8),
        ("evaluate", 8),
        ("checkpoint", 8),
        ("end", 8),
    ]
    assert events[-1]["reason"] == "finished"
    assert losses(order)[8] < losses(order)[1] - 0.05
    assert losses(order)[1] == pytest.approx(math.log(257), rel=1e-2)


def test_a_row_has_what_history_promises(tmp_path: Path) -> None:
    order = order_in(tmp_path, steps=4)
    work(order)
    row = History.load(tmp_path / "history.jsonl")[-1]
    assert row["step"] == 4
    assert row["tokens"] == 4 * order.plan.tokens_per_step
    assert row["learning_rate"] == order.plan.training.learning_rate_at(3)
    assert row["tokens_per_second"] == pytest.approx(order.plan.tokens_per_step / row["step_seconds"])
    assert row.keys() == {
        "step",
        "loss",
        "learning_rate",
        "grad_norm",
        "tokens",
        *TIMINGS,
        "peak_memory_bytes",
    }


def test_results_are_read_at_logging_steps_only(tmp_path: Path, fake: type[FakeBackend]) -> None:
    work(order_in(tmp_path, steps=11, log_every=5, evaluate_every=3, validation=0.2, distribution=EVERY_4))
    assert fake.reads == [1, 5, 10, 11]


def test_evaluations_and_checkpoints_are_not_counted_as_training_time(
    tmp_path: Path, fake: type[FakeBackend], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0

    def passes(seconds: float) -> None:
        nonlocal now
        now += seconds

    real = fake.evaluate
    monkeypatch.setattr("mpsdk.worker.time", types.SimpleNamespace(perf_counter=lambda: now))
    monkeypatch.setattr(fake, "before_step", staticmethod(lambda step: passes(2.0)))
    monkeypatch.setattr(fake, "evaluate", lambda *given, **named: (passes(100.0), real(*given, **named))[1])
    work(order_in(tmp_path, steps=6, log_every=3, validation=0.2, evaluate_every=1))
    assert [row["step_seconds"] for row in History.load(tmp_path / "history.jsonl") if "loss" in row] == [
        2.0
    ] * 3


def test_the_last_step_is_saved_without_being_asked(tmp_path: Path) -> None:
    order = order_in(tmp_path, steps=3)
    work(order)
    checkpoint = newest(order)
    assert (checkpoint.step, checkpoint.samples_consumed) == (3, 12)
    assert checkpoint.plan == order.plan.model_dump(mode="json")
    assert checkpoint.manifest.seeds == {"training": 0}
    assert checkpoint.manifest.tied == {"head.output.weight": "embedding.tokens.weight"}


def test_old_checkpoints_are_pruned(tmp_path: Path) -> None:
    order = order_in(tmp_path, steps=8, distribution={"checkpoint": {"every": 2, "keep": 2}})
    work(order)
    assert [Path(path).name for path in find(order.checkpoints)] == ["step-00000008", "step-00000006"]


def test_every_phase_is_noted_before_it_begins(tmp_path: Path) -> None:
    notes: list[str] = []
    work(order_in(tmp_path, steps=2, validation=0.2), note=notes.append)
    wanted = [
        "looking for where to start",
        "building the model",
        "loading the weights",
        "step 0: reading the batch",
        "step 0: training",
        "step 1: reading the batch",
        "evaluation 2: batch 0",
        "step 2: writing the checkpoint",
        "step 2: committing the checkpoint",
        "leaving",
    ]
    assert [note for note in notes if note in wanted] == wanted


# -- several ranks -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("distribution", [{}, {"sharded_data_parallel": 2}], ids=["replicas", "sharded"])
def test_two_ranks_learn_what_one_does(tmp_path: Path, distribution: dict[str, Any]) -> None:
    alone = order_in(tmp_path / "1", validation=0.2)
    together = order_in(tmp_path / "2", world_size=2, validation=0.2, distribution=distribution)
    work(alone)
    work(together)
    assert losses(together) == pytest.approx(losses(alone), rel=1e-6)
    assert history_of(together)[-1]["validation_loss"] == pytest.approx(
        history_of(alone)[-1]["validation_loss"]
    )
    for name, shape in newest(alone).shapes().items():
        one, two = (
            newest(order).read(name, "weight", (0,) * len(shape), shape) for order in (alone, together)
        )
        np.testing.assert_allclose(two, one, atol=1e-6)


def test_a_run_goes_on_in_another_layout(tmp_path: Path) -> None:
    straight = order_in(tmp_path / "straight", steps=8)
    work(straight)
    first = order_in(tmp_path / "moved", steps=8, world_size=2, distribution={"sharded_data_parallel": 2})
    work(first, answers={2: "stop"})
    work(order_in(tmp_path / "moved", steps=8))
    assert losses(first) == pytest.approx(losses(straight), rel=1e-6)


# -- resuming ------------------------------------------------------------------------------------------------------


def test_a_resumed_run_is_bit_identical_to_one_that_never_stopped(tmp_path: Path) -> None:
    straight = order_in(tmp_path / "straight", steps=9, validation=0.2, evaluate_every=3)
    work(straight)
    resumed = order_in(tmp_path / "resumed", steps=9, validation=0.2, evaluate_every=3)
    work(resumed, answers={2: "stop"})
    assert newest(resumed).step == 4
    events = work(resumed)
    assert kinds(events)[:2] == [("start", 4), ("resume", 4)]
    assert history_of(resumed) == history_of(straight)
    assert tensors_of(newest(resumed)) == tensors_of(newest(straight))
    assert newest(resumed).scalars == newest(straight).scalars
    assert newest(resumed).samples_consumed == newest(straight).samples_consumed


def test_rows_after_the_checkpoint_are_made_again_after_a_crash(
    tmp_path: Path, fake: type[FakeBackend], monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(step: int) -> None:
        if step == 7:
            raise RuntimeError("power cut")

    order = order_in(tmp_path, steps=8, distribution=EVERY_4)
    with monkeypatch.context() as patch:
        patch.setattr(fake, "before_step", staticmethod(crash))
        with pytest.raises(RuntimeError, match="power cut"):
            work(order)
    assert list(losses(order)) == [1, 2, 4, 6]
    work(order)
    assert list(losses(order)) == [1, 2, 4, 6, 8]


def test_a_finished_run_has_nothing_left_to_do(tmp_path: Path) -> None:
    order = order_in(tmp_path, steps=4, validation=0.2)
    work(order)
    before = history_of(order)
    assert kinds(work(order)) == [("start", 4), ("resume", 4), ("end", 4)]
    assert history_of(order) == before


def test_what_an_interrupted_save_left_is_removed_at_the_next_start(tmp_path: Path) -> None:
    order = order_in(tmp_path, steps=2)
    left = Path(order.checkpoints, "step-00000001.tmp-earlier")
    left.mkdir(parents=True)
    work(order)
    assert not left.exists()


def test_auto_passes_over_a_damaged_checkpoint_and_says_so(tmp_path: Path) -> None:
    order = order_in(tmp_path, steps=8, distribution=EVERY_4)
    work(order)
    (file,) = Path(find(order.checkpoints)[0]).glob("*.safetensors")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    resume = work(order)[1]
    assert (resume["event"], resume["step"]) == ("resume", 4)
    (warning,) = resume["warnings"]
    assert "step-00000008 is damaged and passed over" in warning


def test_auto_refuses_to_start_over_where_every_checkpoint_is_damaged(tmp_path: Path) -> None:
    order = order_in(tmp_path, steps=2)
    work(order)
    for file in Path(order.checkpoints).rglob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"no checkpoint .* is intact"):
        work(order)


def test_never_refuses_a_directory_with_checkpoints(tmp_path: Path) -> None:
    order = order_in(tmp_path, steps=2, resume="never")
    work(order)
    with pytest.raises(ConfigError, match=r"holds checkpoints up to step 2; choose another output_dir"):
        work(order)


def test_training_goes_on_from_another_runs_checkpoint(tmp_path: Path) -> None:
    first = order_in(tmp_path / "first", steps=4)
    work(first)
    second = order_in(tmp_path / "second", steps=6, resume=find(first.checkpoints)[0])
    work(second)
    assert list(losses(second)) == [6]
    assert newest(second).samples_consumed == 6 * 4


def test_another_runs_finished_checkpoint_becomes_this_runs(tmp_path: Path) -> None:
    first = order_in(tmp_path / "first", steps=4)
    work(first)
    second = order_in(tmp_path / "second", steps=4, resume=find(first.checkpoints)[0])
    work(second)
    assert tensors_of(newest(second)) == tensors_of(newest(first))


def test_an_older_checkpoint_is_refused_while_newer_ones_lie_beside_it(tmp_path: Path) -> None:
    order = order_in(tmp_path, steps=8, distribution=EVERY_4)
    work(order)
    older = find(order.checkpoints)[1]
    back = order.model_copy(update={"resume": older})
    with pytest.raises(ConfigError, match="up to step 8, newer than step 4"):
        work(back)
    shutil.rmtree(find(order.checkpoints)[0])
    assert kinds(work(back))[1] == ("resume", 4)


def test_a_named_checkpoint_that_is_damaged_is_not_trained_on(tmp_path: Path) -> None:
    first = order_in(tmp_path / "first", steps=4)
    work(first)
    (file,) = Path(find(first.checkpoints)[0]).glob("*.safetensors")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    second = order_in(tmp_path / "second", steps=6, resume=find(first.checkpoints)[0])
    assert expected_checkpoint(second) is not None  # what costs little to know is right
    with pytest.raises(CheckpointError, match="is damaged"):
        work(second)
    file.write_bytes(content[:-1])
    with pytest.raises(CheckpointError, match="is truncated"):
        expected_checkpoint(second)


def test_a_checkpoint_of_another_model_is_refused_with_every_difference(tmp_path: Path) -> None:
    order = order_in(tmp_path, steps=2)
    work(order)
    description = order.plan.description
    shorter = description.model_copy(update={"blocks": description.blocks[:1]})
    training = order.plan.training.model_copy(update={"optimizer": "sgd"})
    plan = order.plan.model_copy(update={"description": shorter, "training": training})
    with pytest.raises(CheckpointError) as caught:
        work(order.model_copy(update={"plan": plan}))
    assert "blocks.1.feed_forward.up.weight [32, 8] is no tensor of the model" in str(caught.value)
    assert "the state of optimizer 'adamw', and training.optimizer is 'sgd'" in str(caught.value)


# -- stopping ------------------------------------------------------------------------------------------------------


def test_a_stop_that_is_asked_for_comes_at_the_next_logging_step(tmp_path: Path) -> None:
    order = order_in(tmp_path, steps=100, log_every=5)
    events = work(order, answers={5: "stop"})
    assert kinds(events)[-3:] == [("log", 10), ("checkpoint", 10), ("end", 10)]
    assert events[-1]["reason"] == "stopped"


def test_sigterm_finishes_the_step_and_saves(
    tmp_path: Path, fake: type[FakeBackend], monkeypatch: pytest.MonkeyPatch
) -> None:
    def preempt(step: int) -> None:
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(fake, "before_step", staticmethod(preempt))
    order = order_in(tmp_path, steps=100)
    events = work(order)
    assert kinds(events)[-2:] == [("checkpoint", 4), ("end", 4)]
    assert signal.getsignal(signal.SIGTERM) == before


def test_all_ranks_stop_at_the_same_step(
    tmp_path: Path, fake: type[FakeBackend], monkeypatch: pytest.MonkeyPatch
) -> None:
    order = order_in(tmp_path, steps=100, world_size=2)
    calls = itertools.count()
    monkeypatch.setattr(
        fake, "before_step", staticmethod(lambda step: next(calls) == 5 and request_stop(tmp_path, "now"))
    )
    events = work(order, generation="now")
    assert kinds(events)[-1][0] == "end"
    assert newest(order).step == events[-1]["step"] <= 6


def test_divergence_is_an_error_that_names_the_step_and_the_last_good_checkpoint(
    tmp_path: Path, fake: type[FakeBackend], monkeypatch: pytest.MonkeyPatch
) -> None:
    order = order_in(tmp_path, steps=100, log_every=3, distribution=EVERY_4)
    monkeypatch.setattr(fake, "loss_of", staticmethod(lambda step, loss: math.nan if step >= 7 else loss))
    with pytest.raises(WorkerError) as caught:
        work(order)
    assert "the loss of step 9 is nan" in str(caught.value)
    assert "finite up to step 6" in str(caught.value)
    assert "last good checkpoint is " + str(Path(order.checkpoints, "step-00000004")) in str(caught.value)


# -- evaluating ----------------------------------------------------------------------------------------------------


def test_an_order_to_evaluate_gives_the_loss_that_training_found(tmp_path: Path) -> None:
    order = order_in(tmp_path, steps=4, validation=0.2)
    trained = work(order)
    rows = history_of(order)
    again = order.model_copy(update={"mode": "evaluate", "resume": find(order.checkpoints)[0]})
    (event,) = work(again)
    assert event == next(event for event in trained if event["event"] == "evaluate")
    assert history_of(order) == rows


def test_an_order_survives_its_file(tmp_path: Path) -> None:
    order = order_in(tmp_path, validation=0.2, distribution={"pipeline": {"degree": 1}, "checkpoint": 4})
    loaded = WorkOrder.load(order.save(tmp_path / "job.json"))
    assert loaded == order
    assert loaded.plan.hash == order.plan.hash
