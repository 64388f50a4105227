"""The one Transformer, assembled from a TransformerSpec: whole on one device, or one pipeline stage of it.

Module names are the canonical tensor names, so `named_parameters()` of a stage lists exactly what the plan says that
the stage holds.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from mpsdk.families.spec import TransformerSpec
from mpsdk_torch.comm import TensorGroup
from mpsdk_torch.dropout import Moment, Site, dropout
from mpsdk_torch.head import Head
from mpsdk_torch.nn import Attention, DistributedEmbedding, FeedForward, Norm
from mpsdk_torch.nn.attention import RotaryTable
from mpsdk_torch.reach import Reach, pooled_index

BlockCall = Callable[[Tensor, "Moment | None", "Tensor | None"], Tensor]
Recompute = Callable[[BlockCall, Tensor, "Moment | None", "Tensor | None"], Tensor]
"""Runs a block's layer on hidden states, and decides what is kept for the backward."""


class Embedding(nn.Module):
    """The sum of a token's embedding, its position's and its type's, as far as there are any; normed, if so, and dropped.

    (batch, length) -> (batch, length or its part, width).
    """

    def __init__(self, spec: TransformerSpec, vocab_rows: int, group: TensorGroup) -> None:
        super().__init__()
        self.group, self.dropout, self.padding = group, spec.dropout.embedding, spec.position_padding
        self.site = Site(-1, "embedding", group.rank if group.sequence_parallel else 0)
        self.tokens = DistributedEmbedding(vocab_rows, spec.hidden_size, group=group)
        self.positions = Table(spec.position_rows, spec) if spec.positions == "learned" else None
        self.token_types = Table(spec.token_types, spec) if spec.token_types else None
        norm = Norm(spec.hidden_size, kind=spec.norm, epsilon=spec.norm_epsilon)
        self.norm = norm if spec.embedding_norm else None

    def forward(self, ids: Tensor, moment: Moment | None, token_type_ids: Tensor | None = None) -> Tensor:
        hidden = self.tokens(ids)
        part = hidden.shape[1]
        start = self.group.rank * part if self.group.sequence_parallel else 0
        own = slice(start, start + part)
        if self.positions is not None:
            hidden = hidden + self._positions(self.positions.weight, ids, own)
        if self.token_types is not None:
            table = self.token_types.weight
            typed = (
                table[0] if token_type_ids is None else functional.embedding(token_type_ids[:, own], table)
            )
            hidden = hidden + typed
        if self.norm is not None:
            hidden = self.norm(hidden)
        return dropout(hidden, self.dropout, moment, self.site, training=self.training)

    def _positions(self, table: Tensor, ids: Tensor, own: slice) -> Tensor:
        """The rows of `table` for this rank's part of the sequence."""
        if self.padding is None:
            return table[own]
        stands = ids != self.padding
        return functional.embedding((stands.cumsum(dim=1) * stands)[:, own] + self.padding, table)


class Table(nn.Module):
    """`rows` vectors, whole on every rank."""

    def __init__(self, rows: int, spec: TransformerSpec) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, spec.hidden_size))


def keep_everything(layer: BlockCall, hidden: Tensor, moment: Moment | None, reach: Tensor | None) -> Tensor:
    return layer(hidden, moment, reach)


class Block(nn.Module):
    """One transformer layer: attention and feed-forward, each added to the residual stream; where the norms stand, and whether
    the two follow each other, is the spec's.

    `recompute` decides what its forward keeps for the backward; `mpsdk_torch.recompute` sets it.
    """

    def __init__(
        self, spec: TransformerSpec, block: int, group: TensorGroup, rotary: RotaryTable | None
    ) -> None:
        super().__init__()
        part = group.rank if group.sequence_parallel else 0
        self.dropout, self.residual = spec.dropout.residual, spec.residual
        self.norms_after = spec.norm_position == "after"
        self.sites = (Site(block, "attention residual", part), Site(block, "feed-forward residual", part))
        self.attention_norm = Norm(spec.hidden_size, kind=spec.norm, epsilon=spec.norm_epsilon)
        self.attention = Attention(spec, block, group, rotary)
        self.feed_forward_norm = None
        if spec.residual != "parallel-one-norm":
            self.feed_forward_norm = Norm(spec.hidden_size, kind=spec.norm, epsilon=spec.norm_epsilon)
        self.feed_forward = FeedForward(spec, group)
        self.recompute: Recompute = keep_everything

    def forward(self, hidden: Tensor, moment: Moment | None, reach: Tensor | None) -> Tensor:
        if not torch.is_grad_enabled():
            return self.layer(hidden, moment, reach)
        return self.recompute(self.layer, hidden, moment, reach)

    def layer(self, hidden: Tensor, moment: Moment | None, reach: Tensor | None) -> Tensor:
        if self.norms_after:
            assert self.feed_forward_norm is not None
            hidden = self.attention_norm(
                hidden + self._drop(self.attention(hidden, moment, reach), 0, moment)
            )
            return self.feed_forward_norm(hidden + self._drop(self.feed_forward(hidden), 1, moment))
        normed = self.attention_norm(hidden)
        branch = self._drop(self.attention(normed, moment, reach), 0, moment)
        if self.residual == "sequential":
            hidden = hidden + branch
        if self.feed_forward_norm is not None:
            normed = self.feed_forward_norm(hidden)
        if self.residual != "sequential":
            hidden = hidden + branch
        return hidden + self._drop(self.feed_forward(normed), 1, moment)

    def _drop(self, branch: Tensor, site: int, moment: Moment | None) -> Tensor:
        return dropout(branch, self.dropout, moment, self.sites[site], training=self.training)


class Transformer(nn.Module):
    """Blocks [start, stop) of a model; with the embedding if `first`, with the head if `last`.

    Args:
        vocab_rows: rows of the vocabulary, padding included. Logits of padding rows are meaningless; the loss leaves
            them out.

    Forward: ids (batch, length) if first, else hidden states (batch, length or its part, width); gives hidden states,
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
        self.blocks = nn.ModuleDict(
            {str(block): Block(spec, block, group, rotary) for block in range(start, stop)}
        )
        self.tied_here = spec.tied and first and last
        self.head = Head(spec, rows, group, tied=self.tied_here) if last else None

    def forward(
        self,
        inputs: Tensor,
        moment: Moment | None = None,
        *,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
    ) -> Tensor:
        hidden = inputs if self.embedding is None else self.embedding(inputs, moment, token_type_ids)
        batch, part = hidden.shape[:2]
        length = part * (self.group.size if self.group.sequence_parallel else 1)
        reach = Reach(self.spec, length, attention_mask, hidden.device)
        for number, block in self.blocks.items():
            hidden = block(hidden, moment, reach.of_block(int(number)))
        if self.head is None:
            return hidden
        tied_weight = self.embedding.tokens.weight if self.tied_here and self.embedding is not None else None
        pooled = None
        if self.spec.head.objective == "sequence-classification":
            pooled = pooled_index(self.spec, attention_mask, length, batch, hidden.device)
        return self.head(hidden, tied_weight, moment, pooled)
