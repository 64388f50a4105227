"""Llama 1 to 3.x (Touvron et al. 2023, arXiv:2302.13971) as `transformers.LlamaForCausalLM` defines it."""

from __future__ import annotations

from mpsdk.families import llama_like
from mpsdk.families.family import Family
from mpsdk.families.fields import Fields
from mpsdk.families.spec import TransformerSpec

DEFAULTS = llama_like.Defaults(vocab_size=32000, feed_forward_size=11008, max_positions=2048)


def read(fields: Fields) -> TransformerSpec:
    fields.only("pretraining_tp", 1, "linear layers are not computed in slices")
    spec = llama_like.read(fields, "llama", DEFAULTS)
    return spec.model_copy(update={"feed_forward_bias": fields.flag("mlp_bias", False)})


def write(spec: TransformerSpec) -> dict[str, object]:
    biases = {"attention_bias": spec.attention_bias, "mlp_bias": spec.feed_forward_bias}
    return llama_like.write(spec) | biases


LLAMA = Family(
    model_type="llama",
    prefix="model.",
    read=read,
    write=write,
    body=llama_like.BODY,
    heads=llama_like.heads("Llama"),
    ignored=llama_like.IGNORED,
)
