"""GPT-Neo (Black et al. 2021) as `transformers.GPTNeoForCausalLM` defines it: blocks with and without a window take turns."""

from __future__ import annotations

from itertools import groupby
from typing import cast

from mpsdk.families.activations import ACTIVATIONS, hf_activation
from mpsdk.families.family import Family
from mpsdk.families.fields import Fields
from mpsdk.families.heads import causal_lm, sequence_classifier, token_classifier
from mpsdk.families.rules import WeightRule, renamed
from mpsdk.families.spec import Dropout, TransformerSpec

GLOBAL, LOCAL = "global", "local"
USUAL_WINDOW = 256


def read(fields: Fields) -> TransformerSpec:
    hidden = fields.integer("hidden_size", 2048)
    heads = fields.integer("num_heads", 16)
    if fields.sound("hidden_size", "num_heads") and hidden % heads:
        fields.problem("num_heads", f"must divide hidden_size = {hidden}")
    blocks = fields.integer("num_layers", 24)
    return TransformerSpec(
        family="gpt_neo",
        vocab_size=fields.integer("vocab_size", 50257),
        hidden_size=hidden,
        blocks=blocks,
        heads=heads,
        key_value_heads=heads,
        head_size=max(hidden // heads, 1),
        feed_forward_size=fields.integer("intermediate_size", 4 * hidden),
        max_positions=fields.integer("max_position_embeddings", 2048),
        norm="layernorm",
        norm_epsilon=fields.positive("layer_norm_epsilon", 1e-5),
        positions="learned",
        activation=fields.choice("activation_function", ACTIVATIONS, "gelu_new"),
        gated=False,
        attention_bias=False,
        attention_output_bias=True,
        feed_forward_bias=True,
        tied=fields.flag("tie_word_embeddings", True),
        initializer_range=fields.positive("initializer_range", 0.02),
        attention_scale=1.0,  # scores are not divided by anything
        attention_windows=_windows(fields, blocks),
        dropout=Dropout(
            embedding=fields.probability("embed_dropout", 0.0),
            attention=fields.probability("attention_dropout", 0.0),
            residual=fields.probability("resid_dropout", 0.0),
        ),
    )


def _windows(fields: Fields, blocks: int) -> tuple[int | None, ...]:
    """`attention_types` says it in runs, such as [[["global", "local"], 12]]; `attention_layers` repeats it block by block."""
    size = fields.integer("window_size", USUAL_WINDOW)
    fields.unused("attention_layers")
    given = fields.raw("attention_types")
    runs = [[[GLOBAL, LOCAL], 12]] if given is None else given
    try:
        kinds = [kind for names, count in cast("list[tuple[list[str], int]]", runs) for kind in names * count]
    except (TypeError, ValueError):
        kinds = []
    if len(kinds) != blocks or set(kinds) - {GLOBAL, LOCAL}:
        example = f'[[["{GLOBAL}", "{LOCAL}"], {blocks // 2}]]'
        remedy = f'must name "{GLOBAL}" or "{LOCAL}" for {blocks} blocks in all, such as {example}'
        fields.problem("attention_types", remedy, got=runs)
        return ()
    return tuple(size if kind == LOCAL else None for kind in kinds) if LOCAL in kinds else ()


def write(spec: TransformerSpec) -> dict[str, object]:
    sizes = {size for size in spec.attention_windows if size is not None}
    kinds = [GLOBAL if spec.window(block) is None else LOCAL for block in range(spec.blocks)]
    pairs, odd = divmod(spec.blocks, 2)
    by_turns = not odd and kinds == [GLOBAL, LOCAL] * pairs
    runs = [[[GLOBAL, LOCAL], pairs]] if by_turns else [[[kind], len([*run])] for kind, run in groupby(kinds)]
    return {
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.hidden_size,
        "num_layers": spec.blocks,
        "num_heads": spec.heads,
        "intermediate_size": None
        if spec.feed_forward_size == 4 * spec.hidden_size
        else spec.feed_forward_size,
        "max_position_embeddings": spec.max_positions,
        "layer_norm_epsilon": spec.norm_epsilon,
        "activation_function": hf_activation(spec.activation),
        "attention_types": runs,
        "window_size": min(sizes, default=USUAL_WINDOW),
        "tie_word_embeddings": spec.tied,
        "initializer_range": spec.initializer_range,
        "embed_dropout": spec.dropout.embedding,
        "attention_dropout": spec.dropout.attention,
        "resid_dropout": spec.dropout.residual,
    }


BLOCK = "transformer.h.{block}"
ATTENTION = f"{BLOCK}.attn.attention"

GPT_NEO = Family(
    model_type="gpt_neo",
    prefix="transformer.",
    read=read,
    write=write,
    body=(
        WeightRule("transformer.wte.weight", ("embedding.tokens.weight",)),
        WeightRule("transformer.wpe.weight", ("embedding.positions.weight",)),
        *renamed(f"{BLOCK}.ln_1", "blocks.{block}.attention_norm"),
        *renamed(f"{ATTENTION}.q_proj", "blocks.{block}.attention.query"),
        *renamed(f"{ATTENTION}.k_proj", "blocks.{block}.attention.key"),
        *renamed(f"{ATTENTION}.v_proj", "blocks.{block}.attention.value"),
        *renamed(f"{ATTENTION}.out_proj", "blocks.{block}.attention.output"),
        *renamed(f"{BLOCK}.ln_2", "blocks.{block}.feed_forward_norm"),
        *renamed(f"{BLOCK}.mlp.c_fc", "blocks.{block}.feed_forward.up"),
        *renamed(f"{BLOCK}.mlp.c_proj", "blocks.{block}.feed_forward.down"),
        *renamed("transformer.ln_f", "head.norm"),
    ),
    heads=(
        causal_lm("GPTNeoForCausalLM"),
        sequence_classifier("GPTNeoForSequenceClassification"),
        token_classifier("GPTNeoForTokenClassification", layer="classifier"),
    ),
    ignored=(f"{ATTENTION}.bias", f"{ATTENTION}.masked_bias"),  # causal masks in files of transformers 4
    aliases={"num_attention_heads": "num_heads", "num_hidden_layers": "num_layers"},
)
