"""Activation functions: transformers' names for the ones that a spec can have."""

from __future__ import annotations

from collections.abc import Mapping

from mpsdk.families.spec import Activation

ACTIVATIONS: Mapping[str, Activation] = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}


def hf_activation(activation: Activation) -> str:
    """The first of transformers' names for it."""
    return next(name for name, found in ACTIVATIONS.items() if found == activation)
