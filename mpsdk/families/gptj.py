"""GPT-J (Wang and Komatsuzaki 2021) as `transformers.GPTJForCausalLM` defines it."""

from __future__ import annotations

from mpsdk.families.activations import ACTIVATIONS, hf_activation
from mpsdk.families.family import Family
from mpsdk.families.fields import Fields
from mpsdk.families.heads import causal_lm, sequence_classifier
from mpsdk.families.rules import WeightRule, renamed
from mpsdk.families.spec import Dropout, Rotary, TransformerSpec

THETA = 10000.0


def read(fields: Fields) -> TransformerSpec:
    hidden = fields.integer("n_embd", 4096)
    heads = fields.integer("n_head", 16)
    if fields.sound("n_embd", "n_head") and hidden % heads:
        fields.problem("n_head", f"must divide n_embd = {hidden}")
    head_size = max(hidden // heads, 1)
    turning = fields.integer("rotary_dim", 64)
    if fields.sound("n_embd", "n_head", "rotary_dim") and (turning % 2 or turning > head_size):
        fields.problem("rotary_dim", f"must be even, and at most a head's {head_size} features", got=turning)
        turning = head_size
    return TransformerSpec(
        family="gptj",
        vocab_size=fields.integer("vocab_size", 50400),
        hidden_size=hidden,
        blocks=fields.integer("n_layer", 28),
        heads=heads,
        key_value_heads=heads,
        head_size=head_size,
        feed_forward_size=fields.integer("n_inner", 4 * hidden),
        max_positions=fields.integer("n_positions", 2048),
        norm="layernorm",
        norm_epsilon=fields.positive("layer_norm_epsilon", 1e-5),
        positions="rotary",
        rotary=Rotary(theta=THETA, size=None if turning == head_size else turning, interleaved=True),
        activation=fields.choice("activation_function", ACTIVATIONS, "gelu_new"),
        gated=False,
        attention_bias=False,
        attention_output_bias=False,
        feed_forward_bias=True,
        tied=fields.flag("tie_word_embeddings", False),
        initializer_range=fields.positive("initializer_range", 0.02),
        residual="parallel-one-norm",
        dropout=Dropout(
            embedding=fields.probability("embd_pdrop", 0.0),
            attention=fields.probability("attn_pdrop", 0.0),
            residual=fields.probability("resid_pdrop", 0.0),
        ),
    )


def write(spec: TransformerSpec) -> dict[str, object]:
    return {
        "vocab_size": spec.vocab_size,
        "n_embd": spec.hidden_size,
        "n_layer": spec.blocks,
        "n_head": spec.heads,
        "n_inner": None if spec.feed_forward_size == 4 * spec.hidden_size else spec.feed_forward_size,
        "n_positions": spec.max_positions,
        "rotary_dim": spec.rotary.size or spec.head_size if spec.rotary else None,
        "layer_norm_epsilon": spec.norm_epsilon,
        "activation_function": hf_activation(spec.activation),
        "tie_word_embeddings": spec.tied,
        "initializer_range": spec.initializer_range,
        "embd_pdrop": spec.dropout.embedding,
        "attn_pdrop": spec.dropout.attention,
        "resid_pdrop": spec.dropout.residual,
    }


BLOCK = "transformer.h.{block}"

GPTJ = Family(
    model_type="gptj",
    prefix="transformer.",
    read=read,
    write=write,
    body=(
        WeightRule("transformer.wte.weight", ("embedding.tokens.weight",)),
        *renamed(f"{BLOCK}.ln_1", "blocks.{block}.attention_norm"),
        *renamed(f"{BLOCK}.attn.q_proj", "blocks.{block}.attention.query"),
        *renamed(f"{BLOCK}.attn.k_proj", "blocks.{block}.attention.key"),
        *renamed(f"{BLOCK}.attn.v_proj", "blocks.{block}.attention.value"),
        *renamed(f"{BLOCK}.attn.out_proj", "blocks.{block}.attention.output"),
        *renamed(f"{BLOCK}.mlp.fc_in", "blocks.{block}.feed_forward.up"),
        *renamed(f"{BLOCK}.mlp.fc_out", "blocks.{block}.feed_forward.down"),
        *renamed("transformer.ln_f", "head.norm"),
    ),
    heads=(
        causal_lm("GPTJForCausalLM", bias=True),
        sequence_classifier("GPTJForSequenceClassification"),
    ),
    ignored=(f"{BLOCK}.attn.bias", f"{BLOCK}.attn.masked_bias"),  # causal masks in files of transformers 4
    aliases={
        "hidden_size": "n_embd",
        "max_position_embeddings": "n_positions",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
    },
)
