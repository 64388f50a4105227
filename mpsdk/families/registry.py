"""The families that mpsdk knows: one line each."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches

from mpsdk.errors import ConfigError, Problem
from mpsdk.families.bert import BERT
from mpsdk.families.family import Family
from mpsdk.families.gpt2 import GPT2
from mpsdk.families.gpt_neo import GPT_NEO
from mpsdk.families.gpt_neox import GPT_NEOX
from mpsdk.families.gptj import GPTJ
from mpsdk.families.llama import LLAMA
from mpsdk.families.mistral import MISTRAL
from mpsdk.families.qwen2 import QWEN2
from mpsdk.families.qwen3 import QWEN3
from mpsdk.families.roberta import ROBERTA

FAMILIES: Mapping[str, Family] = {
    family.model_type: family
    for family in (GPT2, BERT, ROBERTA, GPTJ, GPT_NEO, GPT_NEOX, LLAMA, MISTRAL, QWEN2, QWEN3)
}


def family_of(model_type: str) -> Family:
    """The family of a `model_type`. Raises ConfigError, with the nearest name, for one that has no table."""
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    close = get_close_matches(model_type, FAMILIES, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    remedy = f"no family of this name; {hint}Families: {', '.join(sorted(FAMILIES))}"
    raise ConfigError([Problem("model.model_type", model_type, remedy)], where="the model")
