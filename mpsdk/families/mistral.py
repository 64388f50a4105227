"""Mistral (Jiang et al. 2023, arXiv:2310.06825) as `transformers.MistralForCausalLM` defines it."""

from __future__ import annotations

from mpsdk.families import llama_like
from mpsdk.families.family import Family
from mpsdk.families.fields import Fields
from mpsdk.families.spec import TransformerSpec

DEFAULTS = llama_like.Defaults(
    vocab_size=32000, feed_forward_size=14336, max_positions=131072, key_value_heads=8, biases=False
)
WINDOW = "sliding_window"


def read(fields: Fields) -> TransformerSpec:
    window = fields.optional_integer(WINDOW) if fields.states(WINDOW) else 4096
    spec = llama_like.read(fields, "mistral", DEFAULTS)
    windows = () if window is None else (window,) * spec.blocks
    return spec.model_copy(update={"attention_windows": windows})


def write(spec: TransformerSpec) -> dict[str, object]:
    return llama_like.write(spec) | {WINDOW: spec.window(0)}


MISTRAL = Family(
    model_type="mistral",
    prefix="model.",
    read=read,
    write=write,
    body=llama_like.BODY,
    heads=llama_like.heads("Mistral"),
    ignored=llama_like.IGNORED,
)
