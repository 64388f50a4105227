"""A pretrained model learns another objective, cut over ranks, and transformers finds the same in its export."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
)

from mpsdk import Estimator
from tests.weights import models

PLAYS = Path(__file__).parents[2] / "examples" / "data" / "shakespeare"
KINDS = {
    "comedy": ("as_you_like_it", "much_ado_about_nothing", "twelfth_night", "taming_of_the_shrew"),
    "tragedy": ("hamlet", "macbeth", "othello", "king_lear"),
}
LENGTH, LINES, TRAINED, HELD_OUT = 64, 6, 400, 100


@pytest.fixture(scope="module")
def directory() -> Path:
    found = models.minilm()
    if found is None:
        pytest.skip("the package of the weights is not installed; run: nox -s weights")
    return found


@pytest.fixture(scope="module")
def passages(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Six lines of a play and its kind, a row: to train on, and held out."""
    rows = []
    for label, plays in KINDS.items():
        for play in plays:
            text = (PLAYS / f"{play}.txt").read_text(encoding="utf-8")
            lines = [line.strip() for line in text.splitlines() if len(line.strip()) > 20]
            rows += [
                {"text": " ".join(lines[start : start + LINES]), "label": label}
                for start in range(0, len(lines) - LINES, LINES)
            ]
    random.Random(0).shuffle(rows)
    folder = tmp_path_factory.mktemp("rows")
    parts = {"train": rows[:TRAINED], "validation": rows[TRAINED : TRAINED + HELD_OUT]}
    for name, part in parts.items():
        text = "\n".join(json.dumps(row) for row in part)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    return folder / "train.jsonl", folder / "validation.jsonl"


@pytest.mark.parametrize("framework", ["torch", "tensorflow"])
def test_bert_learns_to_tell_comedies_from_tragedies(
    directory: Path, passages: tuple[Path, Path], framework: str, tmp_path: Path
) -> None:
    """Tensor parallel over two ranks; its export gives transformers the validation loss and accuracy."""
    train, validation = passages
    run = Estimator(
        directory,
        framework=framework,
        distribution={"tensor_parallel": 2},
        training={
            "objective": "sequence-classification", "labels": ["comedy", "tragedy"], "steps": 20, "global_batch": 16,
            "sequence_length": LENGTH, "learning_rate": 2e-4, "dropout": 0.0, "log_every": 5,
        },
        output_dir=tmp_path / "run",
    ).fit(train, validation)  # fmt: skip
    found = run.history[-1]
    assert found["validation_loss"] < 0.69, "below log 2, which is guessing"
    assert found["validation_accuracy"] > 0.55

    run.export(tmp_path / "export")
    model, report = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "export", output_loading_info=True
    )
    assert not any(report.values()), report
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "export")
    rows = [json.loads(line) for line in validation.read_text(encoding="utf-8").splitlines()]
    given = tokenizer(
        [row["text"] for row in rows],
        truncation=True,
        max_length=LENGTH,
        padding="max_length",
        return_tensors="pt",
    )
    labels = torch.tensor([model.config.label2id[row["label"]] for row in rows])
    with torch.no_grad():
        logits = model.eval()(**given).logits
    loss = torch.nn.functional.cross_entropy(logits, labels).item()
    assert found["validation_loss"] == pytest.approx(loss, rel=1e-5)
    accuracy = (logits.argmax(dim=-1) == labels).double().mean().item()
    assert found["validation_accuracy"] == pytest.approx(accuracy)


def test_bert_learns_to_fill_gaps_with_a_new_head(directory: Path, tmp_path: Path) -> None:
    """In two pipeline stages; the package has no head for it."""
    run = Estimator(
        directory,
        distribution={"pipeline": {"degree": 2, "microbatches": 4}},
        training={
            "objective": "masked-lm", "steps": 12, "global_batch": 16, "sequence_length": LENGTH,
            "learning_rate": 2e-4, "dropout": 0.0, "log_every": 1,
        },
        output_dir=tmp_path / "run",
    ).fit(PLAYS / "hamlet.txt")  # fmt: skip
    losses = [row["loss"] for row in run.history if "loss" in row]
    assert losses[-1] < losses[0] - 2
    run.export(tmp_path / "export")
    _, report = AutoModelForMaskedLM.from_pretrained(tmp_path / "export", output_loading_info=True)
    assert not any(report.values()), report


def test_bert_learns_to_find_names_that_it_sees_without_capitals(directory: Path, tmp_path: Path) -> None:
    """Token classification, sharded over two ranks. A name is a word that has a capital within a line."""
    lines = [
        words
        for words in map(str.split, (PLAYS / "julius_caesar.txt").read_text(encoding="utf-8").splitlines())
        if 4 <= len(words) <= 12 and words[1:] != [word.upper() for word in words[1:]]
    ]
    rows = [
        {
            "words": words,
            "labels": [
                "other",
                *("name" if word[0].isupper() and word != "I" else "other" for word in words[1:]),
            ],
        }
        for words in lines[:800]
    ]
    for name, part in {"train": rows[:640], "validation": rows[640:]}.items():
        text = "\n".join(json.dumps(row) for row in part)
        (tmp_path / f"{name}.jsonl").write_text(text, encoding="utf-8")
    run = Estimator(
        directory,
        distribution={"sharded_data_parallel": 2},
        training={
            "objective": "token-classification", "labels": ["other", "name"], "text_column": "words",
            "label_column": "labels", "steps": 60, "global_batch": 32,
            "sequence_length": 32, "learning_rate": 5e-4, "dropout": 0.0, "log_every": 10,
        },
        output_dir=tmp_path / "run",
    ).fit(tmp_path / "train.jsonl", tmp_path / "validation.jsonl")  # fmt: skip
    found = run.history[-1]
    always_other = sum(label == "other" for row in rows[640:] for label in row["labels"]) / sum(
        len(row["labels"]) for row in rows[640:]
    )
    assert found["validation_accuracy"] > always_other + 0.02
    run.export(tmp_path / "export")
    model, report = AutoModelForTokenClassification.from_pretrained(
        tmp_path / "export", output_loading_info=True
    )
    assert not any(report.values()), report
    assert model.config.id2label == {0: "other", 1: "name"}


@pytest.mark.parametrize(
    ("framework", "distribution"),
    [
        ("torch", {"pipeline": {"degree": 2, "microbatches": 2}, "tensor_parallel": 3}),
        ("tensorflow", {"tensor_parallel": 3}),
    ],
    ids=["torch pp2-tp3", "tensorflow tp3"],
)
def test_llama_learns_shakespeare(
    tmp_path_factory: pytest.TempPathFactory, framework: str, distribution: dict[str, Any], tmp_path: Path
) -> None:
    """Three heads of keys and values, so three tensor-parallel ranks; its export gives transformers the validation loss."""
    directory = models.smollm2(tmp_path_factory.mktemp("smollm2"))
    if directory is None:
        pytest.skip("the package of the weights is not installed; run: nox -s weights")
    length = 60  # which three ranks can share
    held_out = tmp_path / "validation.txt"
    held_out.write_text((PLAYS / "sonnets.txt").read_text(encoding="utf-8")[:3000], encoding="utf-8")
    job = Estimator(
        directory,
        framework=framework,
        distribution=distribution,
        training={"steps": 6, "global_batch": 4, "sequence_length": length, "learning_rate": 2e-4, "log_every": 1},
        output_dir=tmp_path / "run",
    )  # fmt: skip
    run = job.fit(PLAYS / "hamlet.txt", held_out)
    run.export(tmp_path / "export")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "export")

    def loss_of(weights: Path) -> float:
        model = AutoModelForCausalLM.from_pretrained(weights, dtype=torch.float32).eval()
        ids = [*tokenizer(held_out.read_text(encoding="utf-8")).input_ids, tokenizer.eos_token_id]
        used = (len(ids) - 1) // length * length
        with torch.no_grad():
            logits = model(torch.tensor(ids[:used]).view(-1, length)).logits.flatten(0, 1)
        return torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1 : used + 1])).item()

    learned = loss_of(tmp_path / "export")
    assert run.history[-1]["validation_loss"] == pytest.approx(learned, rel=1e-4)
    assert learned < loss_of(directory) - 0.05
