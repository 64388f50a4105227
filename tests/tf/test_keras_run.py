"""A user's own Keras model through the facade, with real processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

from mpsdk import Estimator
from mpsdk.errors import ConfigError
from mpsdk.run import Run
from mpsdk_tf import from_checkpoint
from tests.tf import keras_models

pytestmark = pytest.mark.processes

TEXT = Path(__file__).parents[2] / "examples" / "data" / "shakespeare" / "sonnets.txt"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Two processes, weights sharded."""
    held_out = tmp_path_factory.mktemp("data") / "validation.txt"
    held_out.write_text(TEXT.read_text(encoding="utf-8")[:2000], encoding="utf-8")
    training = {
        "steps": 4,
        "global_batch": 8,
        "sequence_length": 32,
        "learning_rate": 1e-2,
        "tokenizer": "bytes",
    }
    estimator = Estimator(
        keras_models.of_bytes,
        framework="tensorflow",
        distribution={"sharded_data_parallel": 2},
        training=training | {"log_every": 1},
        output_dir=tmp_path_factory.mktemp("run"),
    )
    return estimator.fit(train=TEXT, validation=held_out)


def test_a_run_learns_and_its_checkpoint_is_a_keras_model_with_its_validation_loss(finished: Run) -> None:
    losses = [row["loss"] for row in finished.history if "loss" in row]
    assert len(losses) == 4
    assert losses[-1] < losses[0] - 0.5
    model: Any = from_checkpoint(finished.latest_checkpoint or "")
    tokens = np.array([*TEXT.read_bytes()[:2000], 256])
    used = (len(tokens) - 1) // 32 * 32
    each = keras.losses.sparse_categorical_crossentropy(
        tokens[1 : used + 1].reshape(-1, 32),
        model.predict(tokens[:used].reshape(-1, 32), verbose=0),
        from_logits=True,
    )
    expected = float(np.mean(np.asarray(each, np.float64)))
    assert finished.history[-1]["validation_loss"] == pytest.approx(expected, abs=1e-4)


def test_a_model_of_ones_own_has_no_hugging_face_form(finished: Run, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="belongs to no family"):
        finished.export(tmp_path / "export")


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (lambda: None, "can't be imported by the workers"),
        ("no_such_package:factory", "no module 'no_such_package'"),
        (object(), "or a callable that makes a model"),
    ],
    ids=["lambda", "no module", "no callable"],
)
def test_factories_that_workers_could_not_call_are_refused_at_once(model: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Estimator(model, framework="tensorflow")
