"""What Llama has in common with the decoders that came after it: one table, from which each takes its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from mpsdk.families.activations import ACTIVATIONS, hf_activation
from mpsdk.families.fields import Fields
from mpsdk.families.heads import FamilyHead, causal_lm, sequence_classifier, token_classifier
from mpsdk.families.rope import read_rope, write_rope
from mpsdk.families.rules import WeightRule, renamed
from mpsdk.families.spec import Dropout, TransformerSpec

FULL, SLIDING = "full_attention", "sliding_attention"


@dataclass(frozen=True)
class Defaults:
    """What a configuration's fields are where they are absent, and which are a family's own. None: as many as heads."""

    vocab_size: int
    feed_forward_size: int
    max_positions: int
    key_value_heads: int | None = None
    head_size: int | None = None  # None: hidden_size / heads
    biases: bool = True  # `attention_bias`, on all four projections, is a field


def read(fields: Fields, family: str, defaults: Defaults) -> TransformerSpec:
    """The spec of a configuration with Llama's field names."""
    hidden = fields.integer("hidden_size", 4096)
    heads = fields.integer("num_attention_heads", 32)
    if defaults.head_size is None and fields.sound("hidden_size", "num_attention_heads") and hidden % heads:
        fields.problem("num_attention_heads", f"must divide hidden_size = {hidden}")
    key_value_heads = fields.integer("num_key_value_heads", defaults.key_value_heads or heads)
    if fields.sound("num_attention_heads", "num_key_value_heads") and heads % key_value_heads:
        fields.problem(
            "num_key_value_heads", f"must divide num_attention_heads = {heads}", got=key_value_heads
        )
    head_size = fields.integer("head_dim", defaults.head_size or max(hidden // heads, 1))
    if fields.sound("hidden_size", "num_attention_heads", "head_dim") and head_size % 2:
        fields.problem("head_dim", "must be even: rotary positions turn pairs of features", got=head_size)
    max_positions = fields.integer("max_position_embeddings", defaults.max_positions)
    attention_bias = defaults.biases and fields.flag("attention_bias", False)
    return TransformerSpec(
        family=family,
        vocab_size=fields.integer("vocab_size", defaults.vocab_size),
        hidden_size=hidden,
        blocks=fields.integer("num_hidden_layers", 32),
        heads=heads,
        key_value_heads=key_value_heads,
        head_size=head_size,
        feed_forward_size=fields.integer("intermediate_size", defaults.feed_forward_size),
        max_positions=max_positions,
        norm="rmsnorm",
        norm_epsilon=fields.positive("rms_norm_eps", 1e-6),
        positions="rotary",
        rotary=read_rope(fields, default_theta=10000.0, max_positions=max_positions),
        activation=fields.choice("hidden_act", ACTIVATIONS, "silu"),
        gated=True,
        attention_bias=attention_bias,
        attention_output_bias=attention_bias,
        feed_forward_bias=False,
        tied=fields.flag("tie_word_embeddings", False),
        initializer_range=fields.positive("initializer_range", 0.02),
        dropout=Dropout(attention=fields.probability("attention_dropout", 0.0)),
    )


def write(spec: TransformerSpec) -> dict[str, object]:
    """The fields of `spec` that all of these families have."""
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
        "tie_word_embeddings": spec.tied,
        "initializer_range": spec.initializer_range,
        "attention_dropout": spec.dropout.attention,
    }


def read_layer_types(fields: Fields, blocks: int) -> tuple[int | None, ...]:
    """The attention windows of the families that mix whole and sliding attention, Qwen's.

    `layer_types` says which block is which; without it, those from `max_window_layers` on slide, if `use_sliding_window`.
    """
    uses = fields.flag("use_sliding_window", False)
    size = fields.integer("sliding_window", 4096)
    first = fields.integer("max_window_layers", 28, minimum=0)
    given = fields.raw("layer_types")
    types = [SLIDING if uses and block >= first else FULL for block in range(blocks)]
    if isinstance(given, list | tuple):
        types = [str(name) for name in cast("list[object]", given)]
    if (
        (given is not None and not isinstance(given, list | tuple))
        or len(types) != blocks
        or {*types} - {FULL, SLIDING}
    ):
        fields.problem("layer_types", f"must name one of {FULL}, {SLIDING} for each of the {blocks} blocks")
        return ()
    if SLIDING in types and not uses:
        fields.problem(
            "layer_types", f"names {SLIDING}, which needs use_sliding_window: true and a sliding_window"
        )
    return tuple(size if name == SLIDING else None for name in types) if SLIDING in types else ()


def write_layer_types(spec: TransformerSpec) -> dict[str, object]:
    sizes = {size for size in spec.attention_windows if size is not None}
    written: dict[str, object] = {
        "use_sliding_window": bool(sizes),
        "layer_types": [FULL if spec.window(block) is None else SLIDING for block in range(spec.blocks)],
    }
    return written | ({"sliding_window": min(sizes)} if sizes else {})


BLOCK = "model.layers.{block}"

BODY = (
    WeightRule("model.embed_tokens.weight", ("embedding.tokens.weight",)),
    WeightRule(f"{BLOCK}.input_layernorm.weight", ("blocks.{block}.attention_norm.weight",)),
    *renamed(f"{BLOCK}.self_attn.q_proj", "blocks.{block}.attention.query"),
    *renamed(f"{BLOCK}.self_attn.k_proj", "blocks.{block}.attention.key"),
    *renamed(f"{BLOCK}.self_attn.v_proj", "blocks.{block}.attention.value"),
    WeightRule(f"{BLOCK}.self_attn.q_norm.weight", ("blocks.{block}.attention.query_norm.weight",)),
    WeightRule(f"{BLOCK}.self_attn.k_norm.weight", ("blocks.{block}.attention.key_norm.weight",)),
    *renamed(f"{BLOCK}.self_attn.o_proj", "blocks.{block}.attention.output"),
    WeightRule(f"{BLOCK}.post_attention_layernorm.weight", ("blocks.{block}.feed_forward_norm.weight",)),
    *renamed(f"{BLOCK}.mlp.gate_proj", "blocks.{block}.feed_forward.gate"),
    *renamed(f"{BLOCK}.mlp.up_proj", "blocks.{block}.feed_forward.up"),
    *renamed(f"{BLOCK}.mlp.down_proj", "blocks.{block}.feed_forward.down"),
    WeightRule("model.norm.weight", ("head.norm.weight",)),
)

IGNORED = (
    f"{BLOCK}.self_attn.rotary_emb.inv_freq",
    "model.rotary_emb.inv_freq",
)  # in files of transformers 4


def heads(name: str) -> tuple[FamilyHead, ...]:
    """The heads of the classes that transformers calls `name`ForCausalLM and so on."""
    return (
        causal_lm(f"{name}ForCausalLM"),
        sequence_classifier(f"{name}ForSequenceClassification"),
        token_classifier(f"{name}ForTokenClassification", layer="score"),
    )
