"""The one Transformer, assembled from a TransformerSpec: whole on one device, or one pipeline stage of it.

Layers are named as the canonical tensors are, so that `named_parameters` of a stage lists exactly what the plan says that
the stage holds.
"""

from __future__ import annotations

from collections.abc import Iterator

import keras
import tensorflow as tf

from mpsdk.families.spec import TransformerSpec
from mpsdk_tf.comm import TensorGroup
from mpsdk_tf.dropout import Site, dropout
from mpsdk_tf.nn import Attention, DistributedEmbedding, DistributedOutput, FeedForward, Norm
from mpsdk_tf.nn.attention import RotaryTable
from mpsdk_tf.tensor import Tensor


class Embedding(keras.layers.Layer):
    """Token embedding plus learned positions, if any. (batch, length) -> (batch, length or its part, width).

    `seeds` has a row for each of `sites`; None: dropout, if any, takes TensorFlow's own.
    """

    def __init__(self, spec: TransformerSpec, vocab_rows: int, group: TensorGroup) -> None:
        super().__init__(autocast=False)
        self.group, self.dropout = group, spec.dropout.embedding
        self.sites = (Site(-1, "embedding", group.rank if group.sequence_parallel else 0),)
        self.tokens = DistributedEmbedding(vocab_rows, spec.hidden_size, group=group)
        self.positions = Positions(spec) if spec.positions == "learned" else None
        self.built = True

    def call(self, ids: Tensor, seeds: Tensor | None = None, training: bool = False) -> Tensor:
        hidden = self.tokens(ids)
        if self.positions is not None:
            part = hidden.shape[1]
            start = self.group.rank * part if self.group.sequence_parallel else 0
            hidden = hidden + self.positions.rows(start, part)
        return dropout(hidden, self.dropout, _row(seeds, 0), training=training)


class Positions(keras.layers.Layer):
    """Learned positions: rows [start, start + length) of a table of `max_positions` rows."""

    def __init__(self, spec: TransformerSpec) -> None:
        super().__init__(autocast=False)
        shape = (spec.max_positions, spec.hidden_size)
        self.weight = self.add_weight(name="weight", shape=shape, initializer="zeros")
        self.built = True

    def rows(self, start: int, length: int) -> Tensor:
        return tf.convert_to_tensor(self.weight)[start : start + length]


class Block(keras.layers.Layer):
    """One pre-norm transformer layer: attention and feed-forward, each added to the residual stream."""

    def __init__(
        self, spec: TransformerSpec, block: int, group: TensorGroup, rotary: RotaryTable | None
    ) -> None:
        super().__init__(autocast=False)
        part = group.rank if group.sequence_parallel else 0
        self.dropout = spec.dropout.residual
        self.sites = (
            Site(block, "attention", group.rank),
            Site(block, "attention residual", part),
            Site(block, "feed-forward residual", part),
        )
        self.attention_norm = Norm(spec.hidden_size, kind=spec.norm, epsilon=spec.norm_epsilon)
        self.attention = Attention(spec, group, rotary)
        self.feed_forward_norm = Norm(spec.hidden_size, kind=spec.norm, epsilon=spec.norm_epsilon)
        self.feed_forward = FeedForward(spec, group)
        self.built = True

    def call(self, hidden: Tensor, seeds: Tensor | None = None, training: bool = False) -> Tensor:
        branch = self.attention(self.attention_norm(hidden), _row(seeds, 0), training=training)
        hidden = hidden + dropout(branch, self.dropout, _row(seeds, 1), training=training)
        branch = self.feed_forward(self.feed_forward_norm(hidden))
        return hidden + dropout(branch, self.dropout, _row(seeds, 2), training=training)


class Head(keras.layers.Layer):
    """Final norm and output projection: hidden states -> logits over this rank's rows of the padded vocabulary."""

    def __init__(self, spec: TransformerSpec, vocab_rows: int, group: TensorGroup, *, tied: bool) -> None:
        super().__init__(autocast=False)
        self.norm = Norm(spec.hidden_size, kind=spec.norm, epsilon=spec.norm_epsilon)
        self.output_projection = DistributedOutput(vocab_rows, spec.hidden_size, group=group, tied=tied)
        self.built = True

    def call(self, hidden: Tensor, tied_weight: Tensor | None = None) -> Tensor:
        return self.output_projection(self.norm(hidden), tied_weight)


class Transformer(keras.Model):
    """Blocks [start, stop) of a model; with the embedding if `first`, with the head if `last`.

    Args:
        vocab_rows: rows of the vocabulary, padding included. Logits of padding rows are meaningless; the loss leaves
            them out.

    Call: ids (batch, length) if first, else hidden states (batch, length or its part, width); gives hidden states,
    or, if last, logits (batch, length, vocab_rows / t).
    """

    def __init__(
        self,
        spec: TransformerSpec,
        *,
        vocab_rows: int | None = None,
        blocks: tuple[int, int] | None = None,
        first: bool = True,
        last: bool = True,
        group: TensorGroup | None = None,
    ) -> None:
        super().__init__()
        group = group or TensorGroup()
        rows = vocab_rows or spec.vocab_size
        start, stop = blocks or (0, spec.blocks)
        rotary = RotaryTable(spec) if spec.positions == "rotary" else None
        self.spec = spec
        self.embedding = Embedding(spec, rows, group) if first else None
        self.blocks = {str(block): Block(spec, block, group, rotary) for block in range(start, stop)}
        self.tied_here = spec.tied and first and last
        self.head = Head(spec, rows, group, tied=self.tied_here) if last else None
        self.built = True

    def call(self, inputs: Tensor, training: bool = False) -> Tensor:
        hidden = inputs if self.embedding is None else self.embedding(inputs, training=training)
        for block in self.blocks.values():
            hidden = block(hidden, training=training)
        if self.head is None:
            return hidden
        tied = self.embedding.tokens.weight if self.tied_here and self.embedding is not None else None
        return self.head(hidden, tied)


def named_parameters(layer: keras.layers.Layer, prefix: str = "") -> Iterator[tuple[str, keras.Variable]]:
    """The parameters of `layer` and of the layers in it, by their place: canonical names, for a Transformer."""
    for name, value in vars(layer).items():
        # Keras keeps the name `output` of a layer for itself.
        place = f"{prefix}{name.removesuffix('_projection')}"
        if isinstance(value, keras.Variable):
            yield place, value
        elif isinstance(value, keras.layers.Layer):
            yield from named_parameters(value, f"{place}.")
        elif name == "blocks":
            for key, block in value.items():
                yield from named_parameters(block, f"{place}.{key}.")


def _row(seeds: Tensor | None, row: int) -> Tensor | None:
    return None if seeds is None else seeds[row]
