"""Weights of transformers' own models, translated in both frameworks: the same names, the same bits."""

from __future__ import annotations

import importlib
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import numpy as np
import pytest

from mpsdk.families import FAMILIES
from tests.cases import EVERY_HEAD
from tests.parity import tensorflow_side
from tests.torch.test_translate import functions, model_of, of


@pytest.mark.parametrize("name", EVERY_HEAD)
def test_both_frameworks_translate_alike(name: str, tensorflow: ProcessPoolExecutor) -> None:
    family, _, objective = name.partition("-")
    model: Any = model_of(of(family), objective)
    config = model.config.to_dict()
    theirs = {key: values.numpy() for key, values in model.state_dict().items()}
    answer = tensorflow.submit(tensorflow_side.translated, family, theirs, config)

    to_hf, from_hf = functions(family)
    ours = from_hf(model.state_dict(), config=config)
    again = to_hf(ours, config=config)
    for expected, found in zip((ours, again), answer.result(), strict=True):
        assert found.keys() == expected.keys()
        for key, values in expected.items():
            np.testing.assert_array_equal(found[key], values.numpy())


def test_the_modules_of_both_frameworks_have_the_same_names(tensorflow: ProcessPoolExecutor) -> None:
    for family in FAMILIES:
        module = importlib.import_module(f"mpsdk_torch.nn.huggingface.{family.replace('_', '')}")
        mine = sorted(key for key in vars(module) if key.startswith("translate"))
        assert tensorflow.submit(tensorflow_side.translations, family).result() == mine
