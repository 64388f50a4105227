"""What BERT and RoBERTa have in common: encoders whose blocks norm after each sum."""

from __future__ import annotations

from mpsdk.families.activations import ACTIVATIONS, hf_activation
from mpsdk.families.fields import Fields
from mpsdk.families.rules import WeightRule, renamed
from mpsdk.families.spec import Dropout, TransformerSpec


def read(fields: Fields, family: str, *, vocab_size: int, position_padding: int | None) -> TransformerSpec:
    """`position_padding`: see the spec; that many rows and one of the position table are not for tokens."""
    hidden = fields.integer("hidden_size", 768)
    heads = fields.integer("num_attention_heads", 12)
    if fields.sound("hidden_size", "num_attention_heads") and hidden % heads:
        fields.problem("num_attention_heads", f"must divide hidden_size = {hidden}")
    fields.only("is_decoder", False, "this family is trained as an encoder")
    fields.only("add_cross_attention", False, "there is no other model to attend to")
    fields.only("position_embedding_type", "absolute", "positions are rows of a table")
    rows = fields.integer("max_position_embeddings", 512)
    reserved = 0 if position_padding is None else position_padding + 1
    if fields.sound("max_position_embeddings") and rows <= reserved:
        fields.problem(
            "max_position_embeddings", f"must be above {reserved}: rows up to there stand for no token"
        )
    dropout = fields.probability("hidden_dropout_prob", 0.1)
    return TransformerSpec(
        family=family,
        vocab_size=fields.integer("vocab_size", vocab_size),
        hidden_size=hidden,
        blocks=fields.integer("num_hidden_layers", 12),
        heads=heads,
        key_value_heads=heads,
        head_size=max(hidden // heads, 1),
        feed_forward_size=fields.integer("intermediate_size", 3072),
        max_positions=max(rows - reserved, 1),
        norm="layernorm",
        norm_epsilon=fields.positive("layer_norm_eps", 1e-12),
        positions="learned",
        activation=fields.choice("hidden_act", ACTIVATIONS, "gelu"),
        gated=False,
        attention_bias=True,
        attention_output_bias=True,
        feed_forward_bias=True,
        tied=fields.flag("tie_word_embeddings", True),
        initializer_range=fields.positive("initializer_range", 0.02),
        causal=False,
        norm_position="after",
        embedding_norm=True,
        token_types=fields.integer("type_vocab_size", 2),
        position_padding=position_padding,
        dropout=Dropout(
            embedding=dropout,
            attention=fields.probability("attention_probs_dropout_prob", 0.1),
            residual=dropout,
        ),
    )


def write(spec: TransformerSpec) -> dict[str, object]:
    return {
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.hidden_size,
        "num_hidden_layers": spec.blocks,
        "num_attention_heads": spec.heads,
        "intermediate_size": spec.feed_forward_size,
        "max_position_embeddings": spec.position_rows,
        "layer_norm_eps": spec.norm_epsilon,
        "hidden_act": hf_activation(spec.activation),
        "type_vocab_size": spec.token_types,
        "tie_word_embeddings": spec.tied,
        "initializer_range": spec.initializer_range,
        "hidden_dropout_prob": spec.dropout.residual,
        "attention_probs_dropout_prob": spec.dropout.attention,
    }


def classifier_dropout(fields: Fields) -> float:
    stated = fields.raw("classifier_dropout")
    return fields.probability("hidden_dropout_prob" if stated is None else "classifier_dropout", 0.1)


def body(prefix: str) -> tuple[WeightRule, ...]:
    """The rules of all but the head; `prefix` with its dot."""
    block = f"{prefix}encoder.layer." + "{block}"
    return (
        WeightRule(f"{prefix}embeddings.word_embeddings.weight", ("embedding.tokens.weight",)),
        WeightRule(f"{prefix}embeddings.position_embeddings.weight", ("embedding.positions.weight",)),
        WeightRule(f"{prefix}embeddings.token_type_embeddings.weight", ("embedding.token_types.weight",)),
        *renamed(f"{prefix}embeddings.LayerNorm", "embedding.norm"),
        *renamed(f"{block}.attention.self.query", "blocks.{block}.attention.query"),
        *renamed(f"{block}.attention.self.key", "blocks.{block}.attention.key"),
        *renamed(f"{block}.attention.self.value", "blocks.{block}.attention.value"),
        *renamed(f"{block}.attention.output.dense", "blocks.{block}.attention.output"),
        *renamed(f"{block}.attention.output.LayerNorm", "blocks.{block}.attention_norm"),
        *renamed(f"{block}.intermediate.dense", "blocks.{block}.feed_forward.up"),
        *renamed(f"{block}.output.dense", "blocks.{block}.feed_forward.down"),
        *renamed(f"{block}.output.LayerNorm", "blocks.{block}.feed_forward_norm"),
    )


def output(decoder: str, bias: str) -> tuple[WeightRule, ...]:
    """The rules of a masked language model's output projection, whose bias has a name of its own while it is tied."""
    return (
        WeightRule(f"{decoder}.weight", ("head.output.weight",)),
        WeightRule(bias, ("head.output.bias",), tied=True),
        WeightRule(f"{decoder}.bias", ("head.output.bias",), tied=False),
    )


SPELLINGS = {
    "LayerNorm.gamma": "LayerNorm.weight",
    "LayerNorm.beta": "LayerNorm.bias",
}  # TensorFlow's first release
