"""Runs of every objective on the numpy backend: data with labels, masked text, what an evaluation measures."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mpsdk import Estimator, Run, Training
from mpsdk.config import Distribution
from mpsdk.errors import ConfigError, DataError
from mpsdk.families.describe import describe_spec
from mpsdk.families.heads import written_labels
from mpsdk.families.read import read_model
from mpsdk.inputs import Preparation, read_inputs
from mpsdk.launch import LocalLauncher
from mpsdk.report.history import History
from mpsdk.resolve import resolve
from mpsdk.work_order import WorkOrder
from tests.core import fake_backend
from tests.core.jobs import MODEL, TEXT, work

BERT: dict[str, Any] = {
    "model_type": "bert",
    "vocab_size": 257,
    "max_position_embeddings": 32,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
}
KIND, UNKIND = ("fine", "lovely", "great"), ("dull", "awful", "poor")
REVIEWS = [
    {"text": f"{word} film {number}", "label": "good" if word in KIND else "bad"}
    for number in range(16)
    for word in (*KIND, *UNKIND)
]
PAIRS = [
    {"text": f"film {number}", "pair": word, "label": int(word in KIND)}
    for number in range(16)
    for word in (*KIND, *UNKIND)
]
TAGGED = [
    {"text": ["the", "film", "is", word], "label": ["O", "THING", "O", "GOOD" if word in KIND else "BAD"]}
    for word in (*KIND, *UNKIND)
] * 8
JOBS: dict[str, tuple[dict[str, Any], Any]] = {
    "reviews": ({"objective": "sequence-classification", "labels": ["bad", "good"]}, REVIEWS),
    "pairs": ({"objective": "sequence-classification", "pair_column": "pair"}, PAIRS),
    "words": ({"objective": "token-classification", "labels": ["O", "THING", "GOOD", "BAD"]}, TAGGED),
    "masked": ({"objective": "masked-lm", "mask_probability": 0.3}, [{"text": TEXT}]),
    "text": ({"objective": "causal-lm"}, [{"text": TEXT}]),
}
TRAINING: dict[str, Any] = {
    "steps": 24,
    "global_batch": 8,
    "sequence_length": 24,
    "learning_rate": 3e-2,
    "learning_rate_schedule": "constant",
    "tokenizer": "bytes",
    "log_every": 8,
    "evaluate_every": 12,
}
METRICS = {
    "reviews": {"accuracy", "f1_macro", "f1"},
    "pairs": {"accuracy", "f1_macro", "f1"},
    "words": {"accuracy", "f1_macro"},
    "masked": {"perplexity"},
    "text": {"perplexity"},
}


def order_of(
    name: str, directory: Path, *, data: object = None, world_size: int = 1, **training: Any
) -> WorkOrder:
    """An order to do one of the jobs in `directory`, a quarter of its data held out."""
    settings, rows = JOBS[name]
    how = Training.parse({**TRAINING, **settings, **training})
    model = BERT if how.classifies or name == "masked" else MODEL | {"n_positions": 32}
    read = read_model(model, objective=how.objective, labels=len(how.labels or ()) or None)
    plan = resolve(
        Distribution.parse({"sharded_data_parallel": world_size}),
        describe_spec(read.spec),
        how,
        world_size=world_size,
        framework="fake",
    )
    named = written_labels(how.labels) if how.labels else {}
    order = WorkOrder(
        mode="train",
        plan=plan,
        output_dir=str(directory),
        resume="never",
        hf_config={**read.hf_config, **named},  # type: ignore[arg-type]
    )
    inputs = read_inputs(rows if data is None else data, 0.25)
    train, validation = Preparation(order, directory / "data").of(inputs)
    return order.model_copy(update={"train": train, "validation": validation})


def rows_of(order: WorkOrder) -> list[dict[str, Any]]:
    return History.load(Path(order.output_dir, "history.jsonl"))


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize("name", JOBS)
def test_every_objective_learns_and_says_how_well(name: str, tmp_path: Path) -> None:
    order = order_of(name, tmp_path)
    events = [event for event in work(order) if event["event"] == "evaluate"]
    losses = [row["loss"] for row in rows_of(order) if "loss" in row]
    evaluated = [row for row in rows_of(order) if "validation_loss" in row]
    assert losses[-1] < 0.8 * losses[0]
    assert [row["step"] for row in evaluated] == [event["step"] for event in events] == [12, 24]
    for row, event in zip(evaluated, events, strict=True):
        assert row.keys() == {
            "step",
            "validation_loss",
            *(f"validation_{metric}" for metric in METRICS[name]),
        }
        assert all(row[f"validation_{metric}"] == event[metric] for metric in ("loss", *METRICS[name]))
        if "perplexity" in event:
            assert event["perplexity"] == pytest.approx(math.exp(event["loss"]))
    if order.plan.training.classifies:
        assert evaluated[-1]["validation_accuracy"] > 0.9


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize("name", JOBS)
def test_the_number_of_ranks_changes_nothing(name: str, tmp_path: Path) -> None:
    orders = [order_of(name, tmp_path / str(ranks), world_size=ranks, steps=6) for ranks in (1, 2)]
    evaluations = []
    for order in orders:
        evaluations.append([event for event in work(order) if event["event"] == "evaluate"])
    for first, second in zip(*map(rows_of, orders), strict=True):
        for column in {*first} - {"tokens_per_second", "step_seconds", "peak_memory_bytes"}:
            assert first[column] == pytest.approx(second[column], rel=1e-5), column
    assert [event["loss"] for event in evaluations[0]] == pytest.approx(
        [event["loss"] for event in evaluations[1]], rel=1e-5
    )


@pytest.mark.usefixtures("fake")
def test_rows_are_evaluated_once_each(tmp_path: Path) -> None:
    order = order_of("reviews", tmp_path, steps=1)
    (event,) = [event for event in work(order) if event["event"] == "evaluate"]
    assert event["labels"] == len(REVIEWS) // 4


@pytest.mark.usefixtures("fake")
def test_a_run_goes_on_with_the_masks_that_it_would_have_had(tmp_path: Path) -> None:
    whole = order_of("masked", tmp_path / "whole", steps=8, log_every=1)
    work(whole)
    for steps in (5, 8):
        part = order_of("masked", tmp_path / "parts", steps=steps, log_every=1)
        work(part.model_copy(update={"resume": "auto"}))
    expected = [(row["step"], row["loss"]) for row in rows_of(whole) if "loss" in row]
    assert [(row["step"], row["loss"]) for row in rows_of(part) if "loss" in row] == expected


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize("name", ["reviews", "masked"])
def test_the_order_says_all_that_a_rank_needs_to_open_the_data(name: str, tmp_path: Path) -> None:
    order = order_of(name, tmp_path)
    loaded = WorkOrder.load(order.save(tmp_path / "job.json"))
    for data, again in ((order.train, loaded.train), (order.validation, loaded.validation)):
        assert data is not None and again is not None and data == again
        first, second = data.open(24), again.open(24)
        assert first.fingerprint == second.fingerprint
        indices = np.arange(len(first))
        for array, other in zip(first.rows(indices).values(), second.rows(indices).values(), strict=True):
            assert np.array_equal(array, other)


@pytest.mark.usefixtures("fake")
def test_text_around_which_nothing_stands_is_prepared_once_for_both_language_objectives(
    tmp_path: Path,
) -> None:
    folders = [order_of(name, tmp_path / "same").train for name in ("text", "masked")]
    assert folders[0] is not None and folders[1] is not None
    assert folders[0].directory == folders[1].directory


# -- before a worker starts ------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("fake")
def test_problems_of_training_and_validation_data_are_one_error(tmp_path: Path) -> None:
    estimator = Estimator(
        BERT,
        framework="fake",
        training={**TRAINING, **JOBS["reviews"][0]},
        output_dir=tmp_path / "out",
    )
    (tmp_path / "train.csv").write_text("body,label\na,good\n")
    with pytest.raises(DataError) as caught:
        estimator.fit(tmp_path / "train.csv", validation=[{"text": "", "label": "good"}])
    assert "no column 'text', but 'body', 'label'" in str(caught.value)
    assert "the list of rows, row 0: empty" in str(caught.value)


@pytest.mark.usefixtures("fake")
def test_the_models_own_names_of_classes_are_used(tmp_path: Path) -> None:
    named = BERT | {"id2label": {"0": "bad", "1": "good"}}
    estimator = Estimator(
        named,
        framework="fake",
        training={**TRAINING, "objective": "sequence-classification", "steps": 1},
        launcher=LocalLauncher(processes=1),
        output_dir=tmp_path / "out",
    )
    assert estimator.fit(REVIEWS[:8]).history


@pytest.mark.usefixtures("fake")
@pytest.mark.hf
def test_a_sequence_too_short_for_masked_text_is_refused_when_it_is_planned(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from tests.core.data.test_encoding import make

    make("BERT").save_pretrained(tmp_path / "tokenizer")
    training = {**TRAINING, "objective": "masked-lm", "tokenizer": str(tmp_path / "tokenizer")}
    with pytest.raises(ConfigError, match=r"training\.sequence_length.*at least 3"):
        Estimator(
            BERT | {"vocab_size": 600}, framework="fake", training={**training, "sequence_length": 2}
        ).plan(1)


# -- the facade ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path]]:
    """The output directory of a finished classifier on two ranks, and its data."""
    folder = tmp_path_factory.mktemp("classifier")
    with pytest.MonkeyPatch.context() as patch:
        fake_backend.install_for(patch, folder / "site")
        with (folder / "reviews.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, ["label", "text"])
            writer.writeheader()
            writer.writerows(REVIEWS)
        estimator = Estimator(
            MODEL | {"n_positions": 32},
            framework="fake",
            training={**TRAINING, **JOBS["reviews"][0]},
            distribution={"sharded_data_parallel": 2},
            launcher=LocalLauncher(timeout=60),
            output_dir=folder / "out",
        )
        estimator.fit(folder / "reviews.csv", validation=0.25)
        yield folder / "out", folder / "reviews.csv"


def test_fit_trains_a_classifier_from_a_file(finished: tuple[Path, Path]) -> None:
    run = Run.load(finished[0])
    assert run.history[-1]["validation_accuracy"] == run.history[-1]["validation_f1"] == 1.0
    assert {picture.name for picture in run.pictures} >= {"loss.png"}


def test_evaluate_measures_a_finished_classifier(finished: tuple[Path, Path]) -> None:
    run = Run.load(finished[0])
    result = run.evaluate(finished[1])
    assert result.keys() == {"loss", "labels", "accuracy", "f1_macro", "f1"}
    assert (result["labels"], result["accuracy"]) == (len(REVIEWS), 1.0)
    contrary = [{**row, "label": 1 - (row["label"] == "good")} for row in REVIEWS]
    assert run.evaluate(contrary)["accuracy"] == 0.0
    with pytest.raises(DataError, match="the label 'fair' is unknown, the labels are bad, good"):
        run.evaluate([{"text": "a", "label": "fair"}])


def test_an_exported_classifier_names_its_classes_and_what_fills_rows(
    finished: tuple[Path, Path], tmp_path: Path
) -> None:
    exported = Run.load(finished[0]).export(tmp_path / "exported")
    config = json.loads((exported / "config.json").read_text())
    assert config["id2label"] == {"0": "bad", "1": "good"}
    assert (config["pad_token_id"], config["eos_token_id"]) == (254, 256)
