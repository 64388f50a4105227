"""Qwen3 (Yang et al. 2025, arXiv:2505.09388) as `transformers.Qwen3ForCausalLM` defines it: queries and keys are normed."""

from __future__ import annotations

from mpsdk.families import llama_like
from mpsdk.families.family import Family
from mpsdk.families.fields import Fields
from mpsdk.families.spec import TransformerSpec

DEFAULTS = llama_like.Defaults(
    vocab_size=151936, feed_forward_size=22016, max_positions=32768, key_value_heads=32, head_size=128
)


def read(fields: Fields) -> TransformerSpec:
    spec = llama_like.read(fields, "qwen3", DEFAULTS)
    windows = llama_like.read_layer_types(fields, spec.blocks)
    return spec.model_copy(update={"query_key_norm": True, "attention_windows": windows})


def write(spec: TransformerSpec) -> dict[str, object]:
    biases = {"attention_bias": spec.attention_bias}
    return llama_like.write(spec) | biases | llama_like.write_layer_types(spec)


QWEN3 = Family(
    model_type="qwen3",
    prefix="model.",
    read=read,
    write=write,
    body=llama_like.BODY,
    heads=llama_like.heads("Qwen3"),
    ignored=llama_like.IGNORED,
)
