"""The facade: what it refuses, and what it plans."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import pytest

from mpsdk import Distribution, Estimator, Training
from mpsdk.errors import ConfigError
from mpsdk.launch import LocalLauncher
from tests.core.jobs import MODEL

ROOT = Path(__file__).resolve().parents[2]

# -- arguments -----------------------------------------------------------------------------------------------------


def fields(error: ConfigError) -> set[str]:
    return {problem.field for problem in error.problems}


def test_every_problem_of_the_arguments_is_in_one_error() -> None:
    with pytest.raises(ConfigError) as caught:
        Estimator(
            {"model_type": "gpt3"},
            entry_point="train.py",
            framework="jax",
            distribution={"pipelin": 2, "tensor_parallel": 0},
            training={"steps": 0},
            launcher="slurm",
            callbacks=[print],  # type: ignore[list-item]
            hyperparameters={"lr": 1},
        )
    assert fields(caught.value) == {
        "model.model_type",
        "entry_point",
        "framework",
        "pipelin",
        "tensor_parallel",
        "training.steps",
        "launcher",
        "callbacks.0",
    }
    assert "did you mean pipeline?" in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "field", "words"),
    [
        ({}, "model", "is missing"),
        ({"model": "nowhere/to/be/found"}, "model", "no such directory"),
        ({"model": "package.module:factory"}, "model", "can't be trained yet"),
        ({"model": print}, "model", "can't be trained yet"),
        ({"model": {**MODEL, "n_embd": {1, 2}}}, "model.n_embd", ""),
        ({"entry_point": "train.py"}, "entry_point", "give a model instead"),
        ({"model": MODEL, "hyperparameters": {"lr": 1}}, "hyperparameters", "arguments of an entry_point"),
        ({"model": MODEL, "launcher": object()}, "launcher", "must be the name of a launcher"),
    ],
)
def test_what_cannot_be_trained_is_refused(arguments: dict[str, Any], field: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Estimator(**arguments)
    assert field in fields(caught.value)
    assert words in str(caught.value)


def test_arguments_never_change() -> None:
    estimator = Estimator(MODEL, training={"tokenizer": "bytes"})
    with pytest.raises(FrozenInstanceError):
        estimator.framework = "tensorflow"  # type: ignore[misc]


def test_arguments_are_taken_as_objects_dicts_and_files(tmp_path: Path) -> None:
    (tmp_path / "distribution.yaml").write_text("tensor_parallel: 2\n")
    (tmp_path / "training.yaml").write_text("steps: 7\n")
    files = Estimator(
        MODEL, distribution=tmp_path / "distribution.yaml", training=str(tmp_path / "training.yaml")
    )
    objects = Estimator(MODEL, distribution=Distribution(tensor_parallel=2), training=Training(steps=7))
    dicts = Estimator(MODEL, distribution={"tensor_parallel": 2}, training={"steps": 7})
    assert files.distribution == objects.distribution == dicts.distribution
    assert files.training == objects.training == dicts.training


# -- plan ----------------------------------------------------------------------------------------------------------


def test_a_plan_lists_what_is_wrong_with_degrees_and_with_the_tokenizer() -> None:
    estimator = Estimator(
        {**MODEL, "vocab_size": 200},
        distribution={"tensor_parallel": 3, "pipeline": 4},
        training={"tokenizer": "bytes", "sequence_length": 17},
    )
    with pytest.raises(ConfigError) as caught:
        estimator.plan(world_size=13)
    assert {
        "world_size",
        "tensor_parallel.degree",
        "pipeline.degree",
        "training.sequence_length",
        "training.tokenizer",
    } <= fields(caught.value)
    assert "ids up to 256, and the model's vocab_size is 200; it must be at least 257" in str(caught.value)


def test_without_a_number_the_plan_is_for_as_many_ranks_as_the_launcher_would_start() -> None:
    sharded = {"sharded_data_parallel": 2}
    training = {"sequence_length": 16}
    four = Estimator(MODEL, distribution=sharded, training=training, launcher=LocalLauncher(processes=4))
    assert four.plan().world_size == 4
    assert four.plan().degrees.dp == 2
    with pytest.raises(ConfigError, match="world_size"):
        four.plan(world_size=0)


def test_a_plan_imports_no_framework() -> None:
    code = (
        f"import sys, mpsdk; plan = mpsdk.Estimator({MODEL!r}, training={{'tokenizer': 'bytes', 'sequence_length': 16}},"
        " distribution={'pipeline': 2}).plan(world_size=2); assert 'stage' in str(plan);"
        " print(*{'torch', 'tensorflow', 'transformers', 'jax'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr
