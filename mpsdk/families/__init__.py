"""Model families: what mpsdk knows of each kind of Hugging Face model, one declarative file a family.

    >>> from mpsdk.families import read_model
    >>> read_model({"model_type": "gpt2", "n_layer": 2}).spec.blocks
    2

Adding a family is a file like `llama.py` and its line in `registry.py`. Weights: `mpsdk.families.hf`.
"""

from __future__ import annotations

from mpsdk.families.family import Family
from mpsdk.families.read import ReadModel, read_model
from mpsdk.families.registry import FAMILIES, family_of
from mpsdk.families.spec import Dropout, Rotary, TransformerSpec

__all__ = [
    "FAMILIES",
    "Dropout",
    "Family",
    "ReadModel",
    "Rotary",
    "TransformerSpec",
    "family_of",
    "read_model",
]
