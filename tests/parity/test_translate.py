"""Weights of transformers' own models, translated in both frameworks: the same names, the same bits."""

from __future__ import annotations

import importlib
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from mpsdk.families import FAMILIES
from tests.cases import EVERY_HEAD
from tests.torch.test_translate import functions, model_of, of

State = dict[str, NDArray[np.generic]]


def in_tensorflow(family: str, theirs: State, config: dict[str, Any]) -> tuple[State, State]:
    """What the twins of PyTorch's functions make of transformers' state dict, and of that again, as tensors."""
    import tensorflow as tf

    name = family.replace("_", "")
    module = importlib.import_module(f"mpsdk_tf.nn.huggingface.{name}")
    tensors = {key: tf.constant(values) for key, values in theirs.items()}
    ours = getattr(module, f"translate_hf_state_dict_to_smdistributed_{name}")(tensors, config=config)
    again = getattr(module, f"translate_state_dict_to_hf_{name}")(ours, config=config)
    first, second = ({key: values.numpy() for key, values in state.items()} for state in (ours, again))
    return first, second


@pytest.mark.parametrize("name", EVERY_HEAD)
def test_both_frameworks_translate_alike(name: str, tensorflow: ProcessPoolExecutor) -> None:
    family, _, objective = name.partition("-")
    model: Any = model_of(of(family), objective)
    config = model.config.to_dict()
    theirs = {key: values.numpy() for key, values in model.state_dict().items()}
    answer = tensorflow.submit(in_tensorflow, family, theirs, config)

    to_hf, from_hf = functions(family)
    ours = from_hf(model.state_dict(), config=config)
    again = to_hf(ours, config=config)
    for expected, found in zip((ours, again), answer.result(), strict=True):
        assert found.keys() == expected.keys()
        for key, values in expected.items():
            np.testing.assert_array_equal(found[key], values.numpy())


def test_the_modules_of_both_frameworks_have_the_same_names(tensorflow: ProcessPoolExecutor) -> None:
    for family in FAMILIES:
        name = family.replace("_", "")
        module = importlib.import_module(f"mpsdk_torch.nn.huggingface.{name}")
        mine = sorted(key for key in vars(module) if key.startswith("translate"))
        assert tensorflow.submit(public_names, name).result() == mine


def public_names(module: str) -> list[str]:
    """Of the twin in TensorFlow."""
    found = importlib.import_module(f"mpsdk_tf.nn.huggingface.{module}")
    return sorted(key for key in vars(found) if key.startswith("translate"))
