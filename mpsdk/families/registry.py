"""The families that mpsdk knows: one line each."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches

from mpsdk.errors import ConfigError, Problem
from mpsdk.families.family import Family
from mpsdk.families.gpt2 import GPT2
from mpsdk.families.llama import LLAMA

FAMILIES: Mapping[str, Family] = {family.model_type: family for family in (GPT2, LLAMA)}


def family_of(model_type: str) -> Family:
    """The family of a `model_type`. Raises ConfigError, with the nearest name, for one that has no table."""
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    close = get_close_matches(model_type, FAMILIES, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    remedy = f"no family of this name; {hint}Families: {', '.join(sorted(FAMILIES))}"
    raise ConfigError([Problem("model.model_type", model_type, remedy)], where="the model")
