"""Llama 1 to 3.x (Touvron et al. 2023, arXiv:2302.13971) as `transformers.LlamaForCausalLM` defines it."""

from __future__ import annotations

from mpsdk.families.activations import ACTIVATIONS, hf_activation
from mpsdk.families.family import Family
from mpsdk.families.fields import Fields
from mpsdk.families.rope import read_rope, write_rope
from mpsdk.families.rules import WeightRule, renamed
from mpsdk.families.spec import Dropout, TransformerSpec


def read(fields: Fields) -> TransformerSpec:
    hidden = fields.integer("hidden_size", 4096)
    heads = fields.integer("num_attention_heads", 32)
    if fields.sound("hidden_size", "num_attention_heads") and hidden % heads:
        fields.problem("num_attention_heads", f"must divide hidden_size = {hidden}")
    key_value_heads = fields.integer("num_key_value_heads", heads)
    if fields.sound("num_attention_heads", "num_key_value_heads") and heads % key_value_heads:
        fields.problem("num_key_value_heads", f"must divide num_attention_heads = {heads}")
    head_size = fields.integer("head_dim", max(hidden // heads, 1))
    if fields.sound("hidden_size", "num_attention_heads", "head_dim") and head_size % 2:
        fields.problem("head_dim", "must be even: rotary positions turn pairs of features", got=head_size)
    fields.only("pretraining_tp", 1, "linear layers are not computed in slices")
    max_positions = fields.integer("max_position_embeddings", 2048)
    attention_bias = fields.flag("attention_bias", False)
    return TransformerSpec(
        family="llama",
        vocab_size=fields.integer("vocab_size", 32000),
        hidden_size=hidden,
        blocks=fields.integer("num_hidden_layers", 32),
        heads=heads,
        key_value_heads=key_value_heads,
        head_size=head_size,
        feed_forward_size=fields.integer("intermediate_size", 11008),
        max_positions=max_positions,
        norm="rmsnorm",
        norm_epsilon=fields.positive("rms_norm_eps", 1e-6),
        positions="rotary",
        rotary=read_rope(fields, default_theta=10000.0, max_positions=max_positions),
        activation=fields.choice("hidden_act", ACTIVATIONS, "silu"),
        gated=True,
        attention_bias=attention_bias,
        attention_output_bias=attention_bias,
        feed_forward_bias=fields.flag("mlp_bias", False),
        tied=fields.flag("tie_word_embeddings", False),
        initializer_range=fields.positive("initializer_range", 0.02),
        dropout=Dropout(attention=fields.probability("attention_dropout", 0.0)),
    )


def write(spec: TransformerSpec) -> dict[str, object]:
    return {
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.hidden_size,
        "num_hidden_layers": spec.blocks,
        "num_attention_heads": spec.heads,
        "num_key_value_heads": spec.key_value_heads,
        "head_dim": spec.head_size,
        "intermediate_size": spec.feed_forward_size,
        "max_position_embeddings": spec.max_positions,
        "rms_norm_eps": spec.norm_epsilon,
        "rope_parameters": write_rope(spec),
        "hidden_act": hf_activation(spec.activation),
        "attention_bias": spec.attention_bias,
        "mlp_bias": spec.feed_forward_bias,
        "tie_word_embeddings": spec.tied,
        "initializer_range": spec.initializer_range,
        "attention_dropout": spec.dropout.attention,
    }


BLOCK = "model.layers.{block}"

LLAMA = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    prefix="model.",
    read=read,
    write=write,
    rules=(
        WeightRule("model.embed_tokens.weight", ("embedding.tokens.weight",)),
        WeightRule(f"{BLOCK}.input_layernorm.weight", ("blocks.{block}.attention_norm.weight",)),
        *renamed(f"{BLOCK}.self_attn.q_proj", "blocks.{block}.attention.query"),
        *renamed(f"{BLOCK}.self_attn.k_proj", "blocks.{block}.attention.key"),
        *renamed(f"{BLOCK}.self_attn.v_proj", "blocks.{block}.attention.value"),
        *renamed(f"{BLOCK}.self_attn.o_proj", "blocks.{block}.attention.output"),
        WeightRule(f"{BLOCK}.post_attention_layernorm.weight", ("blocks.{block}.feed_forward_norm.weight",)),
        *renamed(f"{BLOCK}.mlp.gate_proj", "blocks.{block}.feed_forward.gate"),
        *renamed(f"{BLOCK}.mlp.up_proj", "blocks.{block}.feed_forward.up"),
        *renamed(f"{BLOCK}.mlp.down_proj", "blocks.{block}.feed_forward.down"),
        WeightRule("model.norm.weight", ("head.norm.weight",)),
        WeightRule("lm_head.weight", ("head.output.weight",)),
    ),
    ignored=(
        f"{BLOCK}.self_attn.rotary_emb.inv_freq",
        "model.rotary_emb.inv_freq",
    ),  # in files of transformers 4
)
