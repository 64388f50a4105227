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
from mpsdk_tf.head import Head
from mpsdk_tf.nn import Attention, DistributedEmbedding, FeedForward, Norm
from mpsdk_tf.nn.attention import RotaryTable
from mpsdk_tf.nn.embedding import lookup
from mpsdk_tf.nn.linear import sizes
from mpsdk_tf.reach import pooled_index, reach
from mpsdk_tf.tensor import Tensor


class Embedding(keras.layers.Layer):
    """The sum of a token's embedding, its position's and its type's, as far as there are any; normed, if so, and dropped.

    (batch, length) -> (batch, length or its part, width).
    `seeds` has a row for each of `sites`; None: dropout, if any, takes TensorFlow's own.
    """

    def __init__(self, spec: TransformerSpec, vocab_rows: int, group: TensorGroup) -> None:
        super().__init__(autocast=False)
        self.group, self.dropout, self.padding = group, spec.dropout.embedding, spec.position_padding
        self.sites = (Site(-1, "embedding", group.rank if group.sequence_parallel else 0),)
        self.tokens = DistributedEmbedding(vocab_rows, spec.hidden_size, group=group)
        self.positions = Table(spec.position_rows, spec) if spec.positions == "learned" else None
        self.token_types = Table(spec.token_types, spec) if spec.token_types else None
        norm = Norm(spec.hidden_size, kind=spec.norm, epsilon=spec.norm_epsilon)
        self.norm = norm if spec.embedding_norm else None
        self.built = True

    def call(
        self,
        ids: Tensor,
        seeds: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        training: bool = False,
    ) -> Tensor:
        hidden = self.tokens(ids)
        part = hidden.shape[1]
        start = self.group.rank * part if self.group.sequence_parallel else 0
        own = slice(start, start + part) if self.group.sequence_parallel else slice(0, part)
        if self.positions is not None:
            hidden = hidden + self._positions(tf.convert_to_tensor(self.positions.weight), ids, own)
        if self.token_types is not None:
            table = tf.convert_to_tensor(self.token_types.weight)
            hidden = hidden + (table[0] if token_type_ids is None else lookup(table, token_type_ids[:, own]))
        if self.norm is not None:
            hidden = self.norm(hidden)
        return dropout(hidden, self.dropout, _row(seeds, 0), training=training)

    def _positions(self, table: Tensor, ids: Tensor, own: slice) -> Tensor:
        """The rows of `table` for this rank's part of the sequence."""
        if self.padding is None:
            return table[own]
        stands = tf.cast(ids != self.padding, tf.int32)
        return lookup(table, (tf.cumsum(stands, axis=1) * stands)[:, own] + self.padding)


class Table(keras.layers.Layer):
    """`rows` vectors, whole on every rank."""

    def __init__(self, rows: int, spec: TransformerSpec) -> None:
        super().__init__(autocast=False)
        shape = (rows, spec.hidden_size)
        self.weight = self.add_weight(name="weight", shape=shape, initializer="zeros")
        self.built = True


class Block(keras.layers.Layer):
    """One transformer layer: attention and feed-forward, each added to the residual stream; where the norms stand, and whether
    the two follow each other, is the spec's.

    `window`: how many tokens can be reached from each, itself the first; None: all.
    """

    def __init__(
        self, spec: TransformerSpec, block: int, group: TensorGroup, rotary: RotaryTable | None
    ) -> None:
        super().__init__(autocast=False)
        part = group.rank if group.sequence_parallel else 0
        self.spec, self.group, self.window = spec, group, spec.window(block)
        self.dropout = spec.dropout.residual
        self.sites = (
            Site(block, "attention", group.rank),
            Site(block, "attention residual", part),
            Site(block, "feed-forward residual", part),
        )
        self.attention_norm = Norm(spec.hidden_size, kind=spec.norm, epsilon=spec.norm_epsilon)
        self.attention = Attention(spec, group, rotary)
        self.feed_forward_norm = None
        if spec.residual != "parallel-one-norm":
            self.feed_forward_norm = Norm(spec.hidden_size, kind=spec.norm, epsilon=spec.norm_epsilon)
        self.feed_forward = FeedForward(spec, group)
        self.built = True

    def call(
        self,
        hidden: Tensor,
        seeds: Tensor | None = None,
        attention_mask: Tensor | None = None,
        training: bool = False,
    ) -> Tensor:
        length = sizes(hidden)[1] * (self.group.size if self.group.sequence_parallel else 1)
        mask = reach(self.spec, self.window, length, attention_mask)

        def attend(hidden: Tensor) -> Tensor:
            branch = self.attention(hidden, mask, _row(seeds, 0), training=training)
            return dropout(branch, self.dropout, _row(seeds, 1), training=training)

        def feed_forward(hidden: Tensor) -> Tensor:
            return dropout(self.feed_forward(hidden), self.dropout, _row(seeds, 2), training=training)

        if self.spec.norm_position == "after":
            assert self.feed_forward_norm is not None
            hidden = self.attention_norm(hidden + attend(hidden))
            return self.feed_forward_norm(hidden + feed_forward(hidden))
        normed = self.attention_norm(hidden)
        branch = attend(normed)
        if self.spec.residual == "sequential":
            hidden = hidden + branch
        if self.feed_forward_norm is not None:
            normed = self.feed_forward_norm(hidden)
        if self.spec.residual != "sequential":
            hidden = hidden + branch
        return hidden + feed_forward(normed)


class Transformer(keras.Model):
    """Blocks [start, stop) of a model; with the embedding if `first`, with the head if `last`.

    Args:
        vocab_rows: rows of the vocabulary, padding included. Logits of padding rows are meaningless; the loss leaves
            them out.

    Call: ids (batch, length) if first, else hidden states (batch, length or its part, width); gives hidden states,
    or, if last, logits: (batch, length, vocab_rows / t) of a language model, (batch, length or its part, labels) of a
    classifier of tokens, (batch, labels) of one of sequences. `attention_mask` and `token_type_ids`, (batch, length), are of
    the whole sequence on every stage; None: nothing is padded, all tokens are of type 0.
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
        self.spec, self.group = spec, group
        self.embedding = Embedding(spec, rows, group) if first else None
        self.blocks = {str(block): Block(spec, block, group, rotary) for block in range(start, stop)}
        self.tied_here = spec.tied and first and last
        self.head = Head(spec, rows, group, tied=self.tied_here) if last else None
        self.built = True

    def call(
        self,
        inputs: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        training: bool = False,
    ) -> Tensor:
        hidden = inputs
        if self.embedding is not None:
            hidden = self.embedding(inputs, token_type_ids=token_type_ids, training=training)
        for block in self.blocks.values():
            hidden = block(hidden, attention_mask=attention_mask, training=training)
        if self.head is None:
            return hidden
        tied = self.embedding.tokens.weight if self.tied_here and self.embedding is not None else None
        pooled = None
        if self.spec.head.objective == "sequence-classification":
            batch, part, _ = sizes(hidden)
            length = part * (self.group.size if self.group.sequence_parallel else 1)
            pooled = pooled_index(self.spec, attention_mask, length, batch)
        return self.head(hidden, tied, pooled=pooled, training=training)


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
