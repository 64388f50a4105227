"""Layers that are cut over a tensor-parallel group."""

from mpsdk_torch.nn.attention import Attention
from mpsdk_torch.nn.embedding import DistributedEmbedding, DistributedOutput
from mpsdk_torch.nn.feed_forward import FeedForward
from mpsdk_torch.nn.linear import DistributedLinear
from mpsdk_torch.nn.norm import Norm

__all__ = [
    "Attention",
    "DistributedEmbedding",
    "DistributedLinear",
    "DistributedOutput",
    "FeedForward",
    "Norm",
]
