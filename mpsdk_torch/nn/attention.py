"""Causal self-attention with heads cut over a tensor-parallel group, and grouped-query attention."""

from __future__ import annotations

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from mpsdk.families.rotary import inverse_frequencies
from mpsdk.families.spec import TransformerSpec
from mpsdk_torch.comm import TensorGroup, enter_parallel
from mpsdk_torch.dropout import Moment, Site, seed_site
from mpsdk_torch.nn.linear import DistributedLinear


class RotaryTable:
    """Cosines and sines of every position, made once for each device and dtype. Not a buffer: it survives `to_empty`."""

    def __init__(self, spec: TransformerSpec) -> None:
        self._frequencies = torch.from_numpy(inverse_frequencies(spec))
        self._made: dict[tuple[int, torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}

    def __call__(self, length: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Two tensors of shape (length, head size)."""
        key = (length, like.device, like.dtype)
        if key not in self._made:
            angles = torch.outer(torch.arange(length, dtype=torch.float64), self._frequencies)
            angles = torch.cat([angles, angles], dim=-1)
            self._made[key] = (
                angles.cos().to(like.device, like.dtype),
                angles.sin().to(like.device, like.dtype),
            )
        return self._made[key]


def rotate(heads: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotary positions in the half-split style: pairs are (i, i + d/2). Shape (batch, heads, length, head size)."""
    first, second = heads.chunk(2, dim=-1)
    return heads * cosine + torch.cat([-second, first], dim=-1) * sine


def _attend(query: Tensor, key: Tensor, value: Tensor, dropout: float = 0.0) -> Tensor:
    """(batch, heads, length, head size) of queries; keys and values may have fewer heads. Causal."""
    grouped = query.shape[1] != key.shape[1]
    return functional.scaled_dot_product_attention(
        query, key, value, dropout_p=dropout, is_causal=True, enable_gqa=grouped
    )


@torch.compiler.disable(reason="it seeds a generator")
def _attend_dropping(
    query: Tensor, key: Tensor, value: Tensor, dropout: float, moment: Moment | None, site: Site
) -> Tensor:
    """`_attend` with weights dropped, kept out of compiled programs as `mpsdk_torch.dropout` says."""
    seed_site(moment, site, query.device)
    return _attend(query, key, value, dropout)


class Attention(nn.Module):
    """Self-attention. Each rank holds heads / t query heads and key_value_heads / t key and value heads.

    Shape: (batch, length, width) to the same, with this rank's part of the sequence under sequence parallelism.
    """

    def __init__(
        self, spec: TransformerSpec, block: int, group: TensorGroup, rotary: RotaryTable | None
    ) -> None:
        super().__init__()
        self.group, self.rotary, self.head_size = group, rotary, spec.head_size
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
        self.output = DistributedLinear(
            queries, width, cut="row", bias=spec.attention_output_bias, group=group
        )

    def forward(self, hidden: Tensor, moment: Moment | None) -> Tensor:
        hidden = enter_parallel(hidden, self.group)
        query, key, value = self.query(hidden), self.key(hidden), self.value(hidden)
        query, key, value = self._heads(query), self._heads(key), self._heads(value)
        if self.rotary is not None:
            cosine, sine = self.rotary(query.shape[-2], query)
            query, key = rotate(query, cosine, sine), rotate(key, cosine, sine)
        if self.dropout and self.training:
            mixed = _attend_dropping(query, key, value, self.dropout, moment, self.site)
        else:
            mixed = _attend(query, key, value)
        return self.output(mixed.transpose(1, 2).flatten(2))

    def _heads(self, projected: Tensor) -> Tensor:
        """(batch, length, n * head size) to (batch, n, length, head size)."""
        return projected.unflatten(-1, (-1, self.head_size)).transpose(1, 2)
