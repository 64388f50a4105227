"""Qwen2 and Qwen2.5 (Yang et al. 2024, arXiv:2407.10671) as `transformers.Qwen2ForCausalLM` defines them."""

from __future__ import annotations

from mpsdk.families import llama_like
from mpsdk.families.family import Family
from mpsdk.families.fields import Fields
from mpsdk.families.spec import TransformerSpec

DEFAULTS = llama_like.Defaults(
    vocab_size=151936, feed_forward_size=22016, max_positions=32768, key_value_heads=32, biases=False
)


def read(fields: Fields) -> TransformerSpec:
    spec = llama_like.read(fields, "qwen2", DEFAULTS)
    windows = llama_like.read_layer_types(fields, spec.blocks)
    return spec.model_copy(update={"attention_bias": True, "attention_windows": windows})


def write(spec: TransformerSpec) -> dict[str, object]:
    return llama_like.write(spec) | llama_like.write_layer_types(spec)


QWEN2 = Family(
    model_type="qwen2",
    prefix="model.",
    read=read,
    write=write,
    body=llama_like.BODY,
    heads=llama_like.heads("Qwen2"),
    ignored=llama_like.IGNORED,
)
