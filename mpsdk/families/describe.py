"""A TransformerSpec's tensors: names, global shapes, roles and first values, from the spec alone."""

from __future__ import annotations

import math
from collections.abc import Iterator

from mpsdk.description import Initial, ModelDescription, Part, Role, TensorDescription
from mpsdk.families.spec import TransformerSpec

BLOCK_KIND = "block"
TOKENS = "embedding.tokens.weight"

_ZEROS = Initial(kind="zeros")
_ONES = Initial(kind="ones")


def describe_spec(spec: TransformerSpec) -> ModelDescription:
    """The description of the transformer that `spec` says.

    A linear weight is (out, in). Query, key and value are apart; column- and row-parallel cuts fall between heads in
    attention and between features in the feed-forward network.
    """
    return ModelDescription(
        name=spec.family,
        spec=spec,
        naming="canonical",
        max_positions=spec.max_positions,
        vocab_size=spec.vocab_size,
        embedding=tuple(_embedding(spec)),
        kinds={BLOCK_KIND: tuple(_block(spec))},
        blocks=(BLOCK_KIND,) * spec.blocks,
        head=tuple(_head(spec)),
    )


def _embedding(spec: TransformerSpec) -> Iterator[TensorDescription]:
    normal = Initial(kind="normal", std=spec.initializer_range)
    yield TensorDescription(
        name=TOKENS, shape=(spec.vocab_size, spec.hidden_size), role="vocab", part="embedding", initial=normal
    )
    tables = {
        "positions": spec.position_rows if spec.positions == "learned" else 0,
        "token_types": spec.token_types,
    }
    for name, rows in tables.items():
        if rows:
            yield TensorDescription(
                name=f"embedding.{name}.weight",
                shape=(rows, spec.hidden_size),
                role="replicated",
                part="embedding",
                initial=normal,
            )
    if spec.embedding_norm:
        yield from _norm(spec, "embedding.norm", part="embedding")


def _block(spec: TransformerSpec) -> Iterator[TensorDescription]:
    hidden, inner = spec.hidden_size, spec.feed_forward_size
    queries, keys = spec.heads * spec.head_size, spec.key_value_heads * spec.head_size
    into_residual = spec.initializer_range
    if spec.scale_residual_initialisation:
        into_residual /= math.sqrt(2 * spec.blocks)

    yield from _norm(spec, "attention_norm", part="block")
    for name, out, units, unit in (
        ("query", queries, spec.heads, "heads"),
        ("key", keys, spec.key_value_heads, "key_value_heads"),
        ("value", keys, spec.key_value_heads, "key_value_heads"),
    ):
        yield from _linear(
            f"attention.{name}",
            (out, hidden),
            "column",
            (units, unit),
            std=spec.initializer_range,
            bias=spec.attention_bias,
        )
    if spec.query_key_norm:
        for name in ("query_norm", "key_norm"):
            norm = _whole(f"attention.{name}.weight", (spec.head_size,), _ONES, part="block")
            yield norm.model_copy(update={"of_heads": True})
    yield from _linear(
        "attention.output",
        (hidden, queries),
        "row",
        (spec.heads, "heads"),
        std=into_residual,
        bias=spec.attention_output_bias,
    )

    if spec.residual != "parallel-one-norm":
        yield from _norm(spec, "feed_forward_norm", part="block")
    features = (inner, "feed_forward_size")
    for name in ("up", "gate") if spec.gated else ("up",):
        yield from _linear(
            f"feed_forward.{name}",
            (inner, hidden),
            "column",
            features,
            std=spec.initializer_range,
            bias=spec.feed_forward_bias,
        )
    yield from _linear(
        "feed_forward.down", (hidden, inner), "row", features, std=into_residual, bias=spec.feed_forward_bias
    )


def _head(spec: TransformerSpec) -> Iterator[TensorDescription]:
    head, hidden = spec.head, spec.hidden_size
    normal = Initial(kind="normal", std=spec.initializer_range)
    if spec.norm_position == "before":
        yield from _norm(spec, "head.norm", part="head")
    dense = "transform" if head.transform else "pooler" if head.pooler else None
    if dense is not None:
        yield _whole(f"head.{dense}.weight", (hidden, hidden), normal, part="head", decay=True)
        yield _whole(f"head.{dense}.bias", (hidden,), _ZEROS, part="head")
    if head.transform:
        yield from _norm(spec, "head.transform_norm", part="head")
    if head.classifies:
        yield _whole("head.classifier.weight", (head.labels, hidden), normal, part="head", decay=True)
        if head.bias:
            yield _whole("head.classifier.bias", (head.labels,), _ZEROS, part="head")
        return
    yield TensorDescription(
        name="head.output.weight",
        shape=(spec.vocab_size, hidden),
        role="vocab",
        part="head",
        initial=normal,
        tied_to=TOKENS if spec.tied else None,
    )
    if head.bias:
        yield TensorDescription(
            name="head.output.bias",
            shape=(spec.vocab_size,),
            role="vocab",
            part="head",
            decay=False,
            initial=_ZEROS,
        )


def _whole(
    name: str, shape: tuple[int, ...], initial: Initial, *, part: Part, decay: bool = False
) -> TensorDescription:
    """A tensor that every tensor-parallel rank has whole."""
    return TensorDescription(
        name=name, shape=shape, role="replicated", part=part, decay=decay, initial=initial
    )


def _linear(
    name: str, shape: tuple[int, int], role: Role, cut: tuple[int, str], *, std: float, bias: bool
) -> Iterator[TensorDescription]:
    """A block's weight (out, in) and, with `bias`, its bias (out,); a row-parallel layer's bias is whole everywhere."""
    units, unit = cut
    initial = Initial(kind="normal", std=std)
    yield TensorDescription(
        name=f"{name}.weight", shape=shape, role=role, part="block", units=units, unit=unit, initial=initial
    )
    if not bias:
        return
    if role == "row":
        yield _whole(f"{name}.bias", shape[:1], _ZEROS, part="block")
    else:
        yield TensorDescription(
            name=f"{name}.bias",
            shape=shape[:1],
            role=role,
            part="block",
            units=units,
            unit=unit,
            decay=False,
            initial=_ZEROS,
        )


def _norm(spec: TransformerSpec, name: str, *, part: Part) -> Iterator[TensorDescription]:
    yield _whole(f"{name}.weight", (spec.hidden_size,), _ONES, part=part)
    if spec.norm == "layernorm":
        yield _whole(f"{name}.bias", (spec.hidden_size,), _ZEROS, part=part)
