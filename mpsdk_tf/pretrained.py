"""The one Transformer as an ordinary Keras model on one device, without a plan."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from mpsdk.backend import WEIGHT, TensorSource
from mpsdk.families import TransformerSpec, read_model
from mpsdk.families.describe import describe_spec
from mpsdk.families.hf import HuggingFaceSource
from mpsdk.initialise import RandomSource
from mpsdk_tf.transformer import Transformer, named_parameters


def from_config(model: str | Path | Mapping[str, object] | TransformerSpec, *, seed: int = 0) -> Transformer:
    """A model with initial weights, equal to those that a run with this `seed` starts from.

    Args:
        model: a Hugging Face configuration with its `model_type`, a directory with a config.json, or a spec.

    Raises:
        ConfigError: the configuration is unknown, invalid or unsupported.

    >>> from_config({"model_type": "gpt2", "n_layer": 2, "n_embd": 32, "n_head": 4, "vocab_size": 96}).spec.blocks
    2
    """
    spec = read_model(model, weights=False).spec
    return _filled(spec, RandomSource(describe_spec(spec), seed))


def from_pretrained(directory: str | Path) -> Transformer:
    """A model with the weights of a Hugging Face directory, or of a model on its hub.

    Raises:
        ConfigError: see `from_config`.
        CheckpointError: weights that are missing, damaged, or of other names or shapes; all in one error.
    """
    read = read_model(directory)
    assert read.directory is not None
    return _filled(read.spec, HuggingFaceSource(read.directory, read.family, read.spec))


def _filled(spec: TransformerSpec, source: TensorSource) -> Transformer:
    model = Transformer(spec)
    for name, variable in named_parameters(model):
        variable.assign(source.read(name, WEIGHT, (0,) * len(variable.shape), tuple(variable.shape)))
    return model
