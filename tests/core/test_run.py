"""What a run leaves, and what can be done with it afterwards."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from mpsdk import Estimator, Run
from mpsdk.checkpoint import Checkpoint
from mpsdk.errors import CheckpointError, ConfigError, DataError
from mpsdk.families import read_model
from mpsdk.families.hf import HuggingFaceSource
from mpsdk.launch import LocalLauncher
from mpsdk.resolve import resolve
from tests.core import fake_backend
from tests.core.jobs import MODEL, TEXT, TRAINING, order_in

IDS = [*TEXT.encode(), 256]
SAMPLES = (len(IDS) - 1) // 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("run")


@pytest.fixture(scope="module")
def finished(folder: Path) -> Iterator[Path]:
    """The output directory of a finished run on two ranks."""
    with pytest.MonkeyPatch.context() as patch:
        fake_backend.install_for(patch, folder / "site")
        (folder / "corpus.txt").write_text(TEXT, encoding="utf-8")
        estimator = Estimator(
            MODEL,
            framework="fake",
            distribution={"sharded_data_parallel": 2},
            training=TRAINING,
            output_dir=folder / "out",
        )
        estimator.fit(str(folder / "corpus.txt"), validation=0.2)
        yield folder / "out"


def test_a_run_is_found_again_by_its_directory(finished: Path) -> None:
    run = Run.load(finished)
    assert run.plan.framework == "fake" and run.plan.world_size == 2
    assert [row["step"] for row in run.history] == [1, 2, 4, 6, 8, 8]
    assert run.latest_checkpoint == str(finished.resolve() / "checkpoints" / "step-00000008")
    assert {picture.name for picture in run.pictures} == {"loss.png", "loss.svg"}
    assert run.wait() is run


def test_a_run_names_its_checkpoints_newest_first_and_prints_as_its_directory(finished: Path) -> None:
    run = Run.load(finished)
    assert run.checkpoints == [run.latest_checkpoint]
    assert repr(run) == f"Run({str(finished)!r})"


def test_a_run_can_be_moved(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "moved")
    run = Run.load(tmp_path / "moved")
    assert run.latest_checkpoint is not None and run.latest_checkpoint.startswith(str(tmp_path / "moved"))


def test_where_no_run_was_made_there_is_none_to_load(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no run has been made there"):
        Run.load(tmp_path)


def test_evaluate_gives_the_loss_over_every_token_of_the_data(finished: Path, folder: Path) -> None:
    run = Run.load(finished)
    result = run.evaluate(str(folder / "corpus.txt"))
    assert result["tokens"] == SAMPLES * 16
    assert result["perplexity"] == pytest.approx(math.exp(result["loss"]))
    assert [row["step"] for row in run.history] == [1, 2, 4, 6, 8, 8]


def test_evaluating_the_held_out_tail_gives_the_validation_loss(finished: Path) -> None:
    run = Run.load(finished)
    tail = IDS[(SAMPLES - round(0.2 * SAMPLES)) * 16 :]
    assert run.evaluate(tail)["loss"] == pytest.approx(run.history[-1]["validation_loss"], rel=1e-9)


def test_evaluate_says_what_is_wrong_with_the_data(finished: Path) -> None:
    with pytest.raises(DataError, match="too few"):
        Run.load(finished).evaluate([1, 2, 3])


def test_an_exported_run_is_a_hugging_face_directory_with_the_trained_weights(
    finished: Path, tmp_path: Path
) -> None:
    run = Run.load(finished)
    exported = run.export(tmp_path / "exported")
    config = json.loads((exported / "config.json").read_text())
    assert config["eos_token_id"] == 256  # of the tokenizer "bytes"
    model = read_model(exported)
    assert model.spec == run.plan.description.spec
    source = HuggingFaceSource(exported, model.family, model.spec)
    assert run.latest_checkpoint is not None
    checkpoint = Checkpoint.open(run.latest_checkpoint)
    for name, shape in checkpoint.shapes().items():
        whole = (name, "weight", (0,) * len(shape), shape)
        np.testing.assert_array_equal(source.read(*whole), checkpoint.read(*whole))
    with pytest.raises(ConfigError, match="not empty"):
        run.export(exported)


def test_training_starts_from_an_exported_directory(finished: Path, tmp_path: Path) -> None:
    exported = Run.load(finished).export(tmp_path / "exported")
    tuned = Estimator(
        exported,
        framework="fake",
        training={**TRAINING, "steps": 1, "learning_rate": 0.0},
        launcher=LocalLauncher(processes=1),
        output_dir=tmp_path / "tuned",
    ).fit(IDS)
    assert tuned.history[0]["loss"] < 5.5  # a new model begins at log(257) = 5.55
    assert tuned.plan.world_size == 1


def test_an_export_in_no_such_number_format_is_refused(finished: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"dtype \(got 'float8'\): must be one of float32"):
        Run.load(finished).export(tmp_path / "exported", dtype="float8")  # pyright: ignore


def test_before_the_first_checkpoint_there_is_nothing_to_export(tmp_path: Path, finished: Path) -> None:
    order = order_in(tmp_path)
    order.save(tmp_path / "job.json")
    run = Run.load(tmp_path)
    assert (run.latest_checkpoint, run.history, run.pictures) == (None, [], [])
    with pytest.raises(CheckpointError, match="there is no checkpoint in"):
        run.export(tmp_path / "exported")
    with pytest.raises(CheckpointError, match="there is no checkpoint in"):
        run.evaluate([1] * 100)


def test_a_model_of_no_family_has_no_hugging_face_form(tmp_path: Path, finished: Path) -> None:
    order = order_in(tmp_path)
    description = order.plan.description.model_copy(update={"spec": None})
    plan = resolve(order.plan.distribution, description, order.plan.training, world_size=1, framework="fake")
    order.model_copy(update={"plan": plan}).save(tmp_path / "job.json")
    with pytest.raises(ConfigError, match="belongs to no family"):
        Run.load(tmp_path).export(tmp_path / "exported")
