"""Linear layers whose matrix is cut over a tensor-parallel group.

Column: Y = X W^T + b with W cut by rows into W_1 ... W_t, so that each rank has its own columns of Y.
Row: W cut by columns; each rank has a partial sum of Y, and `leave_parallel` adds them up.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from mpsdk_torch.comm import TensorGroup, leave_parallel

LinearMap = Callable[..., Tensor]
"""`torch.nn.functional.linear`, or one that does the same and can defer its weight gradient."""


class DistributedLinear(nn.Module):
    """A linear layer of global size (`in_features`, `out_features`), of which this rank holds one part.

    Args:
        cut: `column` holds (out / t, in) and maps the whole input to this rank's outputs, without communication;
            `row` holds (out, in / t), maps this rank's inputs to the whole output, and sums over the group.

    Shapes: column (batch, length, in) -> (batch, length, out / t); row (batch, length, in / t) -> (batch, length, out),
    or (batch, length / t, out) under sequence parallelism.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        cut: Literal["column", "row"],
        bias: bool,
        group: TensorGroup,
    ) -> None:
        super().__init__()
        self.cut, self.group = cut, group
        self.in_features, self.out_features = in_features, out_features
        size = group.size
        shape = (
            (out_features // size, in_features) if cut == "column" else (out_features, in_features // size)
        )
        self.linear: LinearMap = functional.linear
        self.weight = nn.Parameter(torch.empty(shape))
        self.bias = nn.Parameter(torch.empty(shape[0])) if bias else None

    def forward(self, inputs: Tensor) -> Tensor:
        if self.cut == "column" or self.group.handle is None:
            return self.linear(inputs, self.weight, self.bias)
        output = leave_parallel(self.linear(inputs, self.weight), self.group)
        return output if self.bias is None else output + self.bias

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, cut={self.cut!r}, parts={self.group.size}"
