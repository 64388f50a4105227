"""The layers of the one Transformer, each able to hold a tensor-parallel part of itself."""

from mpsdk_tf.nn.attention import Attention
from mpsdk_tf.nn.embedding import DistributedEmbedding, DistributedOutput
from mpsdk_tf.nn.feed_forward import FeedForward
from mpsdk_tf.nn.linear import DistributedLinear
from mpsdk_tf.nn.norm import Norm

__all__ = [
    "Attention",
    "DistributedEmbedding",
    "DistributedLinear",
    "DistributedOutput",
    "FeedForward",
    "Norm",
]
