"""The TensorFlow backend against transformers' own models, which run in PyTorch: logits and training."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from tests.cases import BOUND, global_batch, make_plan
from tests.layouts import LAYOUTS
from tests.parity import tensorflow_side
from tests.torch.reference import CONFIGS, family_of, reference_training, saved_model


@pytest.fixture(params=CONFIGS)
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[PreTrainedModel, Path]:
    """A model of transformers with random weights, and the directory that it was saved to."""
    directory = tmp_path / "model"
    return saved_model(request.param, directory), directory


def test_logits_of_the_keras_model_are_those_of_transformers(
    saved: tuple[PreTrainedModel, Path], tensorflow: ProcessPoolExecutor
) -> None:
    reference, directory = saved
    ids = global_batch(0, 101)["input_ids"]
    logits = tensorflow.submit(tensorflow_side.logits, str(directory), ids).result()
    with torch.no_grad():
        expected = reference(torch.from_numpy(ids).long(), use_cache=False).logits.numpy()
    assert np.abs(logits - expected).max() <= BOUND * np.abs(expected).max()


@pytest.mark.parametrize("layout", ["single", "pp2-tp2", "sdp2-tp2"])
def test_training_from_a_saved_directory_follows_transformers_with_torch_adamw(
    saved: tuple[PreTrainedModel, Path], layout: str, tensorflow: ProcessPoolExecutor
) -> None:
    reference, directory = saved
    world_size, distribution = LAYOUTS.get(layout, (1, {}))
    settings = {"model": reference.config.to_dict(), "weight_decay": 0.1, "steps": 10}
    plan = make_plan(family_of(reference), world_size, distribution, framework="tensorflow", **settings)
    answer = tensorflow.submit(tensorflow_side.train_from_directory, plan, str(directory), 10)
    losses, norms = reference_training(reference, plan, 10)
    outcome = answer.result()
    np.testing.assert_allclose(outcome.losses, losses, rtol=BOUND)
    np.testing.assert_allclose(outcome.norms, norms, rtol=BOUND)
