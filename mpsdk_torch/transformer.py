"""The one Transformer, assembled from a TransformerSpec: whole on one device, or one pipeline stage of it.

Module names are the canonical tensor names, so `named_parameters()` of a stage lists exactly what the plan says that
the stage holds.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from mpsdk.families.spec import TransformerSpec
from mpsdk_torch.comm import TensorGroup
from mpsdk_torch.dropout import Moment, Site, dropout
from mpsdk_torch.nn import Attention, DistributedEmbedding, DistributedOutput, FeedForward, Norm
from mpsdk_torch.nn.attention import RotaryTable

BlockCall = Callable[[Tensor, "Moment | None"], Tensor]
Recompute = Callable[[BlockCall, Tensor, "Moment | None"], Tensor]
"""Runs a block's layer on hidden states, and decides what is kept for the backward."""


class Embedding(nn.Module):
    """Token embedding plus learned positions, if any. (batch, length) -> (batch, length or its part, width)."""

    def __init__(self, spec: TransformerSpec, vocab_rows: int, group: TensorGroup) -> None:
        super().__init__()
        self.group, self.dropout = group, spec.dropout.embedding
        self.site = Site(-1, "embedding", group.rank if group.sequence_parallel else 0)
        self.tokens = DistributedEmbedding(vocab_rows, spec.hidden_size, group=group)
        self.positions = Positions(spec) if spec.positions == "learned" else None

    def forward(self, ids: Tensor, moment: Moment | None) -> Tensor:
        hidden = self.tokens(ids)
        if self.positions is not None:
            part = hidden.shape[1]
            start = self.group.rank * part if self.group.sequence_parallel else 0
            hidden = hidden + self.positions(start, part)
        return dropout(hidden, self.dropout, moment, self.site, training=self.training)


class Positions(nn.Module):
    """Learned positions: rows [start, start + length) of a table of `max_positions` rows."""

    def __init__(self, spec: TransformerSpec) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(spec.max_positions, spec.hidden_size))

    def forward(self, start: int, length: int) -> Tensor:
        return self.weight[start : start + length]


def keep_everything(layer: BlockCall, hidden: Tensor, moment: Moment | None) -> Tensor:
    return layer(hidden, moment)


class Block(nn.Module):
    """One pre-norm transformer layer: attention and feed-forward, each added to the residual stream.

    `recompute` decides what its forward keeps for the backward; `mpsdk_torch.recompute` sets it.
    """

    def __init__(
        self, spec: TransformerSpec, block: int, group: TensorGroup, rotary: RotaryTable | None
    ) -> None:
        super().__init__()
        part = group.rank if group.sequence_parallel else 0
        self.dropout = spec.dropout.residual
        self.sites = (Site(block, "attention residual", part), Site(block, "feed-forward residual", part))
        self.attention_norm = Norm(spec.hidden_size, kind=spec.norm, epsilon=spec.norm_epsilon)
        self.attention = Attention(spec, block, group, rotary)
        self.feed_forward_norm = Norm(spec.hidden_size, kind=spec.norm, epsilon=spec.norm_epsilon)
        self.feed_forward = FeedForward(spec, group)
        self.recompute: Recompute = keep_everything

    def forward(self, hidden: Tensor, moment: Moment | None) -> Tensor:
        if not torch.is_grad_enabled():
            return self.layer(hidden, moment)
        return self.recompute(self.layer, hidden, moment)

    def layer(self, hidden: Tensor, moment: Moment | None) -> Tensor:
        branch = self.attention(self.attention_norm(hidden), moment)
        hidden = hidden + dropout(branch, self.dropout, moment, self.sites[0], training=self.training)
        branch = self.feed_forward(self.feed_forward_norm(hidden))
        return hidden + dropout(branch, self.dropout, moment, self.sites[1], training=self.training)


class Head(nn.Module):
    """Final norm and output projection: hidden states -> logits over this rank's rows of the padded vocabulary."""

    def __init__(self, spec: TransformerSpec, vocab_rows: int, group: TensorGroup, *, tied: bool) -> None:
        super().__init__()
        self.norm = Norm(spec.hidden_size, kind=spec.norm, epsilon=spec.norm_epsilon)
        self.output = DistributedOutput(vocab_rows, spec.hidden_size, group=group, tied=tied)

    def forward(self, hidden: Tensor, tied_weight: Tensor | None = None) -> Tensor:
        return self.output(self.norm(hidden), tied_weight)


class Transformer(nn.Module):
    """Blocks [start, stop) of a model; with the embedding if `first`, with the head if `last`.

    Args:
        vocab_rows: rows of the vocabulary, padding included. Logits of padding rows are meaningless; the loss leaves
            them out.

    Forward: ids (batch, length) if first, else hidden states (batch, length or its part, width); gives hidden states,
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
        self.blocks = nn.ModuleDict(
            {str(block): Block(spec, block, group, rotary) for block in range(start, stop)}
        )
        self.tied_here = spec.tied and first and last
        self.head = Head(spec, rows, group, tied=self.tied_here) if last else None

    def forward(self, inputs: Tensor, moment: Moment | None = None) -> Tensor:
        hidden = inputs if self.embedding is None else self.embedding(inputs, moment)
        for block in self.blocks.values():
            hidden = block(hidden, moment)
        if self.head is None:
            return hidden
        tied_weight = self.embedding.tokens.weight if self.tied_here and self.embedding is not None else None
        return self.head(hidden, tied_weight)
