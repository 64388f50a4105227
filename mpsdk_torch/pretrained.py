"""The one Transformer as an ordinary module on one device, without a plan."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from mpsdk.backend import WEIGHT, TensorSource
from mpsdk.families import TransformerSpec, read_model
from mpsdk.families.describe import describe_spec
from mpsdk.families.hf import HuggingFaceSource
from mpsdk.families.spec import Objective
from mpsdk.initialise import RandomSource
from mpsdk_torch.transformer import Transformer


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


@torch.no_grad()
def _filled(spec: TransformerSpec, source: TensorSource) -> Transformer:
    model = Transformer(spec)
    for name, parameter in model.named_parameters():
        values = source.read(name, WEIGHT, (0,) * parameter.ndim, tuple(parameter.shape))
        parameter.copy_(torch.from_numpy(np.ascontiguousarray(values)))
    return model
