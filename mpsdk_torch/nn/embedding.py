"""Token embedding and output projection, cut by rows of the vocabulary."""

from __future__ import annotations

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from mpsdk_torch.comm import TensorGroup, enter_parallel, leave_parallel
from mpsdk_torch.nn.linear import LinearMap


class DistributedEmbedding(nn.Module):
    """Rows [rank * n, (rank + 1) * n) of an embedding of `size * n` rows.

    A token outside this rank's rows contributes zeros, and the sum over the group is the lookup.
    Shapes: ids (batch, length) -> (batch, length, width), or this rank's part of the sequence under sequence parallelism.
    """

    def __init__(self, rows: int, width: int, *, group: TensorGroup) -> None:
        super().__init__()
        self.group = group
        self.weight = nn.Parameter(torch.empty(rows // group.size, width))

    def forward(self, ids: Tensor) -> Tensor:
        if self.group.handle is None:
            return functional.embedding(ids, self.weight)
        rows = self.weight.shape[0]
        local = ids - self.group.rank * rows
        outside = (local < 0) | (local >= rows)
        found = functional.embedding(local.masked_fill(outside, 0), self.weight)
        return leave_parallel(found.masked_fill(outside.unsqueeze(-1), 0.0), self.group)


class DistributedOutput(nn.Module):
    """The output projection: logits over this rank's rows of the vocabulary.

    `weight` is None when tied to an embedding on the same rank, whose weight `forward` is then given; `bias`, of this rank's
    rows, is the projection's own.
    Shapes: (batch, length, width), or this rank's part of the sequence -> (batch, length, rows / t).
    """

    def __init__(
        self, rows: int, width: int, *, group: TensorGroup, tied: bool = False, bias: bool = False
    ) -> None:
        super().__init__()
        self.group = group
        self.linear: LinearMap = functional.linear
        self.weight = None if tied else nn.Parameter(torch.empty(rows // group.size, width))
        self.bias = nn.Parameter(torch.empty(rows // group.size)) if bias else None

    def forward(self, hidden: Tensor, tied_weight: Tensor | None = None) -> Tensor:
        weight = self.weight if tied_weight is None else tied_weight
        assert weight is not None
        return self.linear(enter_parallel(hidden, self.group), weight, self.bias)
