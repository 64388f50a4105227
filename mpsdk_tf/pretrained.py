"""Models as ordinary Keras models on one device, without a plan: the one Transformer, or what a run has trained."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import keras

from mpsdk.backend import WEIGHT, TensorSource
from mpsdk.checkpoint import Checkpoint
from mpsdk.description import ModelDescription
from mpsdk.errors import CheckpointError
from mpsdk.factory import Factory
from mpsdk.families import TransformerSpec, read_model
from mpsdk.families.describe import describe_spec
from mpsdk.families.hf import HuggingFaceSource
from mpsdk.families.spec import Objective
from mpsdk.initialise import RandomSource
from mpsdk.plan import Plan
from mpsdk.resume import check_fits
from mpsdk_tf.keras_model import make, shape_of
from mpsdk_tf.transformer import Transformer, named_parameters


def from_config(
    model: str | Path | Mapping[str, object] | TransformerSpec,
    *,
    objective: Objective | None = None,
    labels: int | None = None,
    seed: int = 0,
) -> Transformer:
    """A model with initial weights, equal to those that a run with this `seed` starts from.

    Args:
        model: a Hugging Face configuration with its `model_type`, a directory with a config.json, or a spec.
        objective: what the head is for. None: as the configuration's `architectures` say, else the family's usual one.
        labels: classes of a classifier. None: as the configuration says.

    Raises:
        ConfigError: the configuration is unknown, invalid or unsupported.

    >>> from_config({"model_type": "gpt2", "n_layer": 2, "n_embd": 32, "n_head": 4, "vocab_size": 96}).spec.blocks
    2
    """
    spec = read_model(model, objective=objective, labels=labels, weights=False).spec
    return _filled(spec, RandomSource(describe_spec(spec), seed))


def from_pretrained(
    directory: str | Path,
    *,
    objective: Objective | None = None,
    labels: int | None = None,
    max_seq_len: int | None = None,
    seed: int = 0,
) -> Transformer:
    """A model with the weights of a Hugging Face directory, or of a model on its hub.

    Args:
        objective, labels: see `from_config`. Layers of the head that the directory doesn't have start from initial values.
        max_seq_len: keep this many of the model's positions only.
        seed: of those initial values.

    Raises:
        ConfigError: see `from_config`.
        CheckpointError: weights that are missing, damaged, or of other names or shapes; all in one error.
    """
    read = read_model(directory, objective=objective, labels=labels)
    assert read.directory is not None
    source = HuggingFaceSource(read.directory, read.family, read.spec, seed=seed)
    return _filled(read.spec.shortened(max_seq_len), source)


def from_checkpoint(path: str | Path) -> keras.Model:
    """The model of a run, with the weights of one of its checkpoints: what its factory makes, or its family's Transformer.

    Raises:
        ConfigError: the factory can't be imported, or fails.
        CheckpointError: the checkpoint is damaged, or of another model than the factory makes now.
    """
    checkpoint = Checkpoint.open(path)
    description = ModelDescription.model_validate(checkpoint.plan.get("description"))
    if description.spec is not None:
        return _filled(description.spec, checkpoint)
    if description.factory is None:
        raise CheckpointError(f"checkpoint {path} doesn't say how its model is made")
    plan = Plan.model_validate(checkpoint.plan)
    factory = Factory(description.factory, "", plan.training.sequence_length)
    made = make(
        factory, seed=plan.training.seed, precision=plan.distribution.precision, device="/device:CPU:0"
    )
    check_fits(checkpoint, plan.model_copy(update={"description": made.description()}))
    for weight in made.model.weights:
        shape = shape_of(weight)
        values = checkpoint.read(made.names[id(weight)], WEIGHT, (0,) * len(shape), shape)
        weight.assign(values.reshape(weight.shape))
    return made.model


def _filled(spec: TransformerSpec, source: TensorSource) -> Transformer:
    model = Transformer(spec)
    for name, variable in named_parameters(model):
        variable.assign(source.read(name, WEIGHT, (0,) * len(variable.shape), tuple(variable.shape)))
    return model
