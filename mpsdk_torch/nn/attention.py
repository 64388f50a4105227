"""Self-attention with heads cut over a tensor-parallel group, and grouped-query attention."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from mpsdk.families.rotary import inverse_frequencies
from mpsdk.families.spec import TransformerSpec
from mpsdk_torch.comm import TensorGroup, enter_parallel
from mpsdk_torch.dropout import Moment, Site, seed_site
from mpsdk_torch.nn.linear import DistributedLinear
from mpsdk_torch.nn.norm import Norm


class RotaryTable:
    """Cosines and sines of every position, made once for each device and dtype. Not a buffer: it survives `to_empty`."""

    def __init__(self, spec: TransformerSpec) -> None:
        assert spec.rotary is not None
        self._interleaved = spec.rotary.interleaved
        self._frequencies = torch.from_numpy(inverse_frequencies(spec))
        self._made: dict[tuple[int, torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}

    def __call__(self, length: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Two tensors of shape (length, features that turn)."""
        key = (length, like.device, like.dtype)
        if key not in self._made:
            angles = torch.outer(torch.arange(length, dtype=torch.float64), self._frequencies)
            angles = (
                angles.repeat_interleave(2, dim=-1)
                if self._interleaved
                else torch.cat([angles, angles], dim=-1)
            )
            self._made[key] = (
                angles.cos().to(like.device, like.dtype),
                angles.sin().to(like.device, like.dtype),
            )
        return self._made[key]


def rotate(heads: Tensor, cosine: Tensor, sine: Tensor, *, interleaved: bool) -> Tensor:
    """Turn the first features of each head by its position, as many as the tables have; the rest stay.

    Pairs are (i, i + d/2), or, `interleaved`, (2 i, 2 i + 1). Shape (batch, heads, length, head size).
    """
    size = cosine.shape[-1]
    turning = heads[..., :size]
    if interleaved:
        partner = torch.stack([-turning[..., 1::2], turning[..., ::2]], dim=-1).flatten(-2)
    else:
        first, second = turning.chunk(2, dim=-1)
        partner = torch.cat([-second, first], dim=-1)
    turned = turning * cosine + partner * sine
    return turned if size == heads.shape[-1] else torch.cat([turned, heads[..., size:]], dim=-1)


class Scores(NamedTuple):
    """How scores become weights: their scale (None: 1 / sqrt(head size)), and who is out of reach where no mask says it."""

    scale: float | None
    causal: bool


def _attend(
    query: Tensor, key: Tensor, value: Tensor, reach: Tensor | None, scores: Scores, dropout: float = 0.0
) -> Tensor:
    """(batch, heads, length, head size) of queries; keys and values may have fewer heads.

    `reach`: (batch or 1, 1, length, length), true where a query attends to a key.
    """
    grouped = query.shape[1] != key.shape[1]
    return functional.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=reach,
        dropout_p=dropout,
        is_causal=scores.causal and reach is None,
        scale=scores.scale,
        enable_gqa=grouped,
    )


@torch.compiler.disable(reason="it seeds a generator")
def _attend_dropping(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    reach: Tensor | None,
    scores: Scores,
    dropout: float,
    moment: Moment | None,
    site: Site,
) -> Tensor:
    """`_attend` with weights dropped, kept out of compiled programs as `mpsdk_torch.dropout` says."""
    seed_site(moment, site, query.device)
    return _attend(query, key, value, reach, scores, dropout)


class Attention(nn.Module):
    """Self-attention. Each rank holds heads / t query heads and key_value_heads / t key and value heads.

    Shape: (batch, length, width) to the same, with this rank's part of the sequence under sequence parallelism.
    """

    def __init__(
        self, spec: TransformerSpec, block: int, group: TensorGroup, rotary: RotaryTable | None
    ) -> None:
        super().__init__()
        self.group, self.rotary, self.head_size = group, rotary, spec.head_size
        self.scores = Scores(spec.attention_scale, spec.causal)
        self.interleaved = spec.rotary is not None and spec.rotary.interleaved
        self.dropout = spec.dropout.attention
        self.site = Site(block, "attention", group.rank)
        width, queries, pairs = (
            spec.hidden_size,
            spec.heads * spec.head_size,
            spec.key_value_heads * spec.head_size,
        )

        def column(out_features: int) -> DistributedLinear:
            return DistributedLinear(width, out_features, cut="column", bias=spec.attention_bias, group=group)

        self.query, self.key, self.value = column(queries), column(pairs), column(pairs)
        self.query_norm = self.key_norm = None
        if spec.query_key_norm:
            self.query_norm, self.key_norm = (
                Norm(spec.head_size, kind="rmsnorm", epsilon=spec.norm_epsilon) for _ in range(2)
            )
        self.output = DistributedLinear(
            queries, width, cut="row", bias=spec.attention_output_bias, group=group
        )

    def forward(self, hidden: Tensor, moment: Moment | None, reach: Tensor | None) -> Tensor:
        hidden = enter_parallel(hidden, self.group)
        query, key, value = self.query(hidden), self.key(hidden), self.value(hidden)
        query, key, value = self._heads(query), self._heads(key), self._heads(value)
        if self.query_norm is not None and self.key_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        if self.rotary is not None:
            cosine, sine = self.rotary(query.shape[-2], query)
            query, key = (rotate(x, cosine, sine, interleaved=self.interleaved) for x in (query, key))
        if self.dropout and self.training:
            mixed = _attend_dropping(query, key, value, reach, self.scores, self.dropout, moment, self.site)
        else:
            mixed = _attend(query, key, value, reach, self.scores)
        return self.output(mixed.transpose(1, 2).flatten(2))

    def _heads(self, projected: Tensor) -> Tensor:
        """(batch, length, n * head size) to (batch, n, length, head size)."""
        return projected.unflatten(-1, (-1, self.head_size)).transpose(1, 2)
