"""The feed-forward part of a block, its inner width cut over a tensor-parallel group."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch.nn.functional as functional
from torch import Tensor, nn

from mpsdk.families.spec import TransformerSpec
from mpsdk_torch.comm import TensorGroup, enter_parallel
from mpsdk_torch.nn.linear import DistributedLinear

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": functional.gelu,
    "gelu_tanh": partial(functional.gelu, approximate="tanh"),
    "relu": functional.relu,
    "silu": functional.silu,
}


class FeedForward(nn.Module):
    """down(activation(up(x))), or down(activation(gate(x)) * up(x)) when gated (Shazeer 2020, arXiv:2002.05202).

    Shape: (batch, length, width) to the same, with this rank's part of the sequence under sequence parallelism.
    """

    def __init__(self, spec: TransformerSpec, group: TensorGroup) -> None:
        super().__init__()
        self.group, self.activation = group, ACTIVATIONS[spec.activation]
        width, inner, bias = spec.hidden_size, spec.feed_forward_size, spec.feed_forward_bias
        self.up = DistributedLinear(width, inner, cut="column", bias=bias, group=group)
        self.gate = (
            DistributedLinear(width, inner, cut="column", bias=bias, group=group) if spec.gated else None
        )
        self.down = DistributedLinear(inner, width, cut="row", bias=bias, group=group)

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = enter_parallel(hidden, self.group)
        if self.gate is None:
            return self.down(self.activation(self.up(hidden)))
        gate, up = self.gate(hidden), self.up(hidden)
        return self.down(self.activation(gate) * up)
