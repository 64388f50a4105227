"""The one Transformer as a Keras model on one device. Against transformers' own models: tests/parity."""

from __future__ import annotations

from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

from mpsdk.families import read_model
from mpsdk.families.describe import describe_spec
from mpsdk.families.hf import export
from mpsdk.initialise import RandomSource
from mpsdk_tf import from_config, from_pretrained
from tests.cases import BOUND, FAMILIES, MemorySource, global_batch
from tests.tf.test_parity import reference

IDS = global_batch(0, 101)["input_ids"]


def loss_of(model: keras.Model, labels: np.ndarray) -> float:
    logits = tf.cast(model(IDS), tf.float64)
    losses = tf.nn.sparse_softmax_cross_entropy_with_logits(np.maximum(labels, 0), logits)
    return float(tf.reduce_sum(losses * (labels >= 0)) / (labels >= 0).sum())


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_model_from_a_config_starts_where_a_run_of_the_same_seed_starts(family: str) -> None:
    model = from_config(FAMILIES[family], seed=3)
    loss = loss_of(model, global_batch(0, 101)["labels"])
    np.testing.assert_allclose(loss, reference(family, 10)[0].losses[0], rtol=BOUND)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_model_from_a_directory_has_its_weights(family: str, tmp_path: Path) -> None:
    read = read_model(FAMILIES[family])
    description = describe_spec(read.spec)
    source = RandomSource(description, 3)
    whole = {
        f"weight/{tensor.name}": source.read(tensor.name, "weight", (0,) * len(tensor.shape), tensor.shape)
        for tensor in description.tensors()
        if tensor.tied_to is None
    }
    export(MemorySource(whole, {}), read.spec, tmp_path / "exported", hf_config=read.hf_config)
    model = from_pretrained(tmp_path / "exported")
    np.testing.assert_array_equal(model(IDS), from_config(FAMILIES[family], seed=3)(IDS))


def test_it_is_an_ordinary_keras_model_that_fit_trains() -> None:
    model = from_config(FAMILIES["gpt2"], seed=3)
    model.compile(
        optimizer=keras.optimizers.Adam(1e-2),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=-100),
    )
    batch = global_batch(0, 101)
    history = model.fit(batch["input_ids"], batch["labels"], epochs=8, batch_size=16, verbose=0).history
    assert history["loss"][-1] < 0.8 * history["loss"][0]
