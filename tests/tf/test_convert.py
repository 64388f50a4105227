"""What `mpsdk checkpoint convert` makes of a Hugging Face directory is where training in TensorFlow may start."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mpsdk.backend import Place
from mpsdk.checkpoint import Checkpoint, convert
from mpsdk.families import read_model
from mpsdk.families.export import export
from mpsdk.plan import Plan
from mpsdk_tf.pretrained import from_checkpoint, from_pretrained
from mpsdk_tf.transformer import named_parameters
from tests.cases import FAMILIES, Outcome, assemble
from tests.core.families.test_weights import random_source
from tests.layouts import LAYOUTS
from tests.tf import ranks
from tests.tf.cases import make_plan, train, train_from_directory


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    spec = read_model(FAMILIES["gpt2"]).spec
    return export(random_source(spec), spec, tmp_path / "hf")


def train_from_checkpoint(place: Place, plan: Plan, path: str, steps: int) -> Outcome:
    return train(place, plan, steps, source=Checkpoint.open(path), gradients=False)


def test_training_from_a_converted_checkpoint_is_training_from_the_directory(
    directory: Path, tmp_path: Path
) -> None:
    """Bit for bit, moments included."""
    convert(directory, tmp_path / "checkpoint")
    world_size, distribution = LAYOUTS["pp2-tp2"]
    plan = make_plan("gpt2", world_size, distribution)
    mine = ranks.run(world_size, train_from_checkpoint, plan, str(tmp_path / "checkpoint"), 3)
    theirs = ranks.run(world_size, train_from_directory, plan, str(directory), 3)
    assert [outcome.losses for outcome in mine] == [outcome.losses for outcome in theirs]
    first, second = (
        assemble([piece for outcome in found for piece in outcome.state]) for found in (mine, theirs)
    )
    assert first.keys() == second.keys()
    assert all((first[key] == second[key]).all() for key in first)


def test_a_converted_checkpoint_is_a_keras_model_too(directory: Path, tmp_path: Path) -> None:
    convert(directory, tmp_path / "checkpoint")
    expected = dict(named_parameters(from_pretrained(directory)))
    found = dict(named_parameters(from_checkpoint(tmp_path / "checkpoint")))
    assert found.keys() == expected.keys()
    for name, variable in found.items():
        np.testing.assert_array_equal(variable, expected[name])
