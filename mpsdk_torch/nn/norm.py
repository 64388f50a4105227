"""The two normalisations, over the last dimension. Replicated over a tensor-parallel group."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as functional
from torch import Tensor, nn


class Norm(nn.Module):
    """LayerNorm (with bias) or RMSNorm (Zhang and Sennrich 2019, arXiv:1910.07467). Keeps the shape."""

    def __init__(self, width: int, *, kind: Literal["layernorm", "rmsnorm"], epsilon: float) -> None:
        super().__init__()
        self.kind, self.epsilon, self.width = kind, epsilon, width
        self.weight = nn.Parameter(torch.empty(width))
        self.bias = nn.Parameter(torch.empty(width)) if kind == "layernorm" else None

    def forward(self, hidden: Tensor) -> Tensor:
        if self.kind == "layernorm":
            return functional.layer_norm(hidden, (self.width,), self.weight, self.bias, self.epsilon)
        return functional.rms_norm(hidden, (self.width,), self.weight, self.epsilon)
