"""GPT-2 (Radford et al. 2019) as `transformers.GPT2LMHeadModel` defines it."""

from __future__ import annotations

from mpsdk.families.activations import ACTIVATIONS, hf_activation
from mpsdk.families.family import Family
from mpsdk.families.fields import Fields
from mpsdk.families.heads import causal_lm, sequence_classifier, token_classifier
from mpsdk.families.rules import WeightRule, renamed
from mpsdk.families.spec import Dropout, TransformerSpec


def read(fields: Fields) -> TransformerSpec:
    hidden = fields.integer("n_embd", 768)
    heads = fields.integer("n_head", 12)
    if fields.sound("n_embd", "n_head") and hidden % heads:
        fields.problem("n_head", f"must divide n_embd = {hidden}")
    fields.only(
        "scale_attn_weights", True, "attention scores are always divided by the square root of the head size"
    )
    fields.only("scale_attn_by_inverse_layer_idx", False, "attention scores have one scale in all blocks")
    fields.only(
        "reorder_and_upcast_attn", False, "attention is computed in the precision of the distribution"
    )
    fields.only("add_cross_attention", False, "there is no encoder to attend to")
    fields.unused(
        "n_ctx",
        "summary_activation",
        "summary_first_dropout",
        "summary_proj_to_labels",
        "summary_type",
        "summary_use_proj",
    )
    return TransformerSpec(
        family="gpt2",
        vocab_size=fields.integer("vocab_size", 50257),
        hidden_size=hidden,
        blocks=fields.integer("n_layer", 12),
        heads=heads,
        key_value_heads=heads,
        head_size=max(hidden // heads, 1),
        feed_forward_size=fields.integer("n_inner", 4 * hidden),
        max_positions=fields.integer("n_positions", 1024),
        norm="layernorm",
        norm_epsilon=fields.positive("layer_norm_epsilon", 1e-5),
        positions="learned",
        activation=fields.choice("activation_function", ACTIVATIONS, "gelu_new"),
        gated=False,
        attention_bias=True,
        attention_output_bias=True,
        feed_forward_bias=True,
        tied=fields.flag("tie_word_embeddings", True),
        initializer_range=fields.positive("initializer_range", 0.02),
        scale_residual_initialisation=True,
        dropout=Dropout(
            embedding=fields.probability("embd_pdrop", 0.1),
            attention=fields.probability("attn_pdrop", 0.1),
            residual=fields.probability("resid_pdrop", 0.1),
        ),
    )


def _classifier_dropout(fields: Fields) -> float:
    stated = fields.raw("classifier_dropout")
    return fields.probability("hidden_dropout" if stated is None else "classifier_dropout", 0.1)


def write(spec: TransformerSpec) -> dict[str, object]:
    return {
        "vocab_size": spec.vocab_size,
        "n_embd": spec.hidden_size,
        "n_layer": spec.blocks,
        "n_head": spec.heads,
        "n_inner": None if spec.feed_forward_size == 4 * spec.hidden_size else spec.feed_forward_size,
        "n_positions": spec.max_positions,
        "layer_norm_epsilon": spec.norm_epsilon,
        "activation_function": hf_activation(spec.activation),
        "tie_word_embeddings": spec.tied,
        "initializer_range": spec.initializer_range,
        "embd_pdrop": spec.dropout.embedding,
        "attn_pdrop": spec.dropout.attention,
        "resid_pdrop": spec.dropout.residual,
    }


# GPT-2's linear layers are `Conv1D`: their weights are (in, out), and query, key and value are one layer.
BLOCK = "transformer.h.{block}"
QUERY_KEY_VALUE = tuple("blocks.{block}.attention." + name for name in ("query", "key", "value"))

GPT2 = Family(
    model_type="gpt2",
    prefix="transformer.",
    read=read,
    write=write,
    body=(
        WeightRule("transformer.wte.weight", ("embedding.tokens.weight",)),
        WeightRule("transformer.wpe.weight", ("embedding.positions.weight",)),
        *renamed(f"{BLOCK}.ln_1", "blocks.{block}.attention_norm"),
        WeightRule(
            f"{BLOCK}.attn.c_attn.weight", tuple(f"{name}.weight" for name in QUERY_KEY_VALUE), transpose=True
        ),
        WeightRule(f"{BLOCK}.attn.c_attn.bias", tuple(f"{name}.bias" for name in QUERY_KEY_VALUE)),
        *renamed(f"{BLOCK}.attn.c_proj", "blocks.{block}.attention.output", transpose=True),
        *renamed(f"{BLOCK}.ln_2", "blocks.{block}.feed_forward_norm"),
        *renamed(f"{BLOCK}.mlp.c_fc", "blocks.{block}.feed_forward.up", transpose=True),
        *renamed(f"{BLOCK}.mlp.c_proj", "blocks.{block}.feed_forward.down", transpose=True),
        *renamed("transformer.ln_f", "head.norm"),
    ),
    heads=(
        causal_lm("GPT2LMHeadModel"),
        sequence_classifier("GPT2ForSequenceClassification"),
        token_classifier("GPT2ForTokenClassification", layer="classifier", dropout=_classifier_dropout),
    ),
    ignored=(f"{BLOCK}.attn.bias", f"{BLOCK}.attn.masked_bias"),  # causal masks in files of transformers 4
    aliases={
        "hidden_size": "n_embd",
        "max_position_embeddings": "n_positions",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
    },
)
