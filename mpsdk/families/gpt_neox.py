"""GPT-NeoX and Pythia (Black et al. 2022, arXiv:2204.06745) as `transformers.GPTNeoXForCausalLM` defines them."""

from __future__ import annotations

from mpsdk.families.activations import ACTIVATIONS, hf_activation
from mpsdk.families.family import Family
from mpsdk.families.fields import Fields
from mpsdk.families.heads import causal_lm, sequence_classifier, token_classifier
from mpsdk.families.rope import Partial, read_rope, write_rope
from mpsdk.families.rules import WeightRule, renamed
from mpsdk.families.spec import Dropout, TransformerSpec


def read(fields: Fields) -> TransformerSpec:
    hidden = fields.integer("hidden_size", 6144)
    heads = fields.integer("num_attention_heads", 64)
    if fields.sound("hidden_size", "num_attention_heads") and hidden % heads:
        fields.problem("num_attention_heads", f"must divide hidden_size = {hidden}")
    head_size = max(hidden // heads, 1)
    max_positions = fields.integer("max_position_embeddings", 2048)
    bias = fields.flag("attention_bias", True)
    dropout = fields.probability("hidden_dropout", 0.0)
    fields.only("is_decoder", False, "there is no encoder to attend to")
    return TransformerSpec(
        family="gpt_neox",
        vocab_size=fields.integer("vocab_size", 50432),
        hidden_size=hidden,
        blocks=fields.integer("num_hidden_layers", 44),
        heads=heads,
        key_value_heads=heads,
        head_size=head_size,
        feed_forward_size=fields.integer("intermediate_size", 24576),
        max_positions=max_positions,
        norm="layernorm",
        norm_epsilon=fields.positive("layer_norm_eps", 1e-5),
        positions="rotary",
        rotary=read_rope(
            fields,
            default_theta=10000.0,
            max_positions=max_positions,
            theta_field="rotary_emb_base",
            partial=Partial("rotary_pct", 0.25, head_size),
        ),
        activation=fields.choice("hidden_act", ACTIVATIONS, "gelu"),
        gated=False,
        attention_bias=bias,
        attention_output_bias=bias,
        feed_forward_bias=True,
        tied=fields.flag("tie_word_embeddings", False),
        initializer_range=fields.positive("initializer_range", 0.02),
        residual="parallel" if fields.flag("use_parallel_residual", True) else "sequential",
        dropout=Dropout(
            embedding=dropout, attention=fields.probability("attention_dropout", 0.0), residual=dropout
        ),
    )


def write(spec: TransformerSpec) -> dict[str, object]:
    whole = spec.rotary is not None and spec.rotary.size is None
    return {
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.hidden_size,
        "num_hidden_layers": spec.blocks,
        "num_attention_heads": spec.heads,
        "intermediate_size": spec.feed_forward_size,
        "max_position_embeddings": spec.max_positions,
        "layer_norm_eps": spec.norm_epsilon,
        # Absent, the share would be a quarter.
        "rope_parameters": write_rope(spec) | ({"partial_rotary_factor": 1.0} if whole else {}),
        "hidden_act": hf_activation(spec.activation),
        "attention_bias": spec.attention_bias,
        "tie_word_embeddings": spec.tied,
        "initializer_range": spec.initializer_range,
        "use_parallel_residual": spec.residual == "parallel",
        "hidden_dropout": spec.dropout.residual,
        "attention_dropout": spec.dropout.attention,
    }


BLOCK = "gpt_neox.layers.{block}"
QUERY_KEY_VALUE = tuple("blocks.{block}.attention." + name for name in ("query", "key", "value"))

GPT_NEOX = Family(
    model_type="gpt_neox",
    prefix="gpt_neox.",
    read=read,
    write=write,
    body=(
        WeightRule("gpt_neox.embed_in.weight", ("embedding.tokens.weight",)),
        *renamed(f"{BLOCK}.input_layernorm", "blocks.{block}.attention_norm"),
        *(  # a head's query, key and value lie together
            WeightRule(
                f"{BLOCK}.attention.query_key_value.{kind}",
                tuple(f"{name}.{kind}" for name in QUERY_KEY_VALUE),
                interleaved_by="heads",
            )
            for kind in ("weight", "bias")
        ),
        *renamed(f"{BLOCK}.attention.dense", "blocks.{block}.attention.output"),
        *renamed(f"{BLOCK}.post_attention_layernorm", "blocks.{block}.feed_forward_norm"),
        *renamed(f"{BLOCK}.mlp.dense_h_to_4h", "blocks.{block}.feed_forward.up"),
        *renamed(f"{BLOCK}.mlp.dense_4h_to_h", "blocks.{block}.feed_forward.down"),
        *renamed("gpt_neox.final_layer_norm", "head.norm"),
    ),
    heads=(
        causal_lm("GPTNeoXForCausalLM", output="embed_out"),
        sequence_classifier("GPTNeoXForSequenceClassification"),
        token_classifier("GPTNeoXForTokenClassification", layer="classifier"),
    ),
    ignored=(  # causal masks and frequencies in files of transformers 4
        f"{BLOCK}.attention.bias",
        f"{BLOCK}.attention.masked_bias",
        f"{BLOCK}.attention.rotary_emb.inv_freq",
    ),
    in_memory={"embed_out.": "lm_head."},  # since transformers 5
)
