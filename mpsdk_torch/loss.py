"""Cross-entropy over a vocabulary that is cut over a tensor-parallel group. Logits are never gathered."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as functional
from torch import Tensor

from mpsdk.backend import IGNORED_LABEL
from mpsdk_torch.comm import TensorGroup


def cross_entropy_sum(logits: Tensor, labels: Tensor, *, vocab_size: int, group: TensorGroup) -> Tensor:
    """Sum of the token losses, in fp32; a label of -100 adds nothing, padding rows of the vocabulary take no part.

    Shapes: logits (batch, length, rows / t) of this rank's rows, labels (batch, length); a scalar, equal on all ranks
    of the group.
    """
    rows = logits.shape[-1]
    first = group.rank * rows
    valid = max(0, min(rows, vocab_size - first))
    flat = logits.flatten(0, -2)[:, :valid].float()
    if group.handle is None:
        return functional.cross_entropy(flat, labels.flatten(), ignore_index=IGNORED_LABEL, reduction="sum")
    return _VocabParallelCrossEntropy.apply(flat, labels.flatten(), first, group.handle)


class _VocabParallelCrossEntropy(torch.autograd.Function):
    """loss = log(sum exp(z)) - z_label with the sums over the group; gradient softmax(z) - onehot(label), local.

    Two all-reduces: the maximum, then the sum of exponentials together with the label's logit
    (Shoeybi et al. 2019, arXiv:1909.08053, section 3).
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, first: int, group: dist.ProcessGroup) -> Tensor:
        tokens, rows = logits.shape
        lowest = logits.new_full((tokens,), torch.finfo(logits.dtype).min)
        largest = logits.amax(dim=-1) if rows else lowest  # a rank may hold padding rows alone
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
        shifted = logits - largest.unsqueeze(-1)
        local = labels - first
        here = (local >= 0) & (local < rows)
        index = local.masked_fill(~here, 0).unsqueeze(-1)
        sums = logits.new_zeros((2, tokens))
        if rows:
            sums[1] = shifted.gather(-1, index).squeeze(-1).masked_fill(~here, 0.0)
        exponentials = shifted.exp_()
        sums[0] = exponentials.sum(dim=-1)
        dist.all_reduce(sums, group=group)
        used = labels != IGNORED_LABEL
        ctx.save_for_backward(exponentials.div_(sums[0].unsqueeze(-1)), index, here, used)
        return ((sums[0].log() - sums[1]) * used).sum()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        softmax, index, here, used = ctx.saved_tensors
        result = softmax.clone()
        if result.shape[-1]:
            result.scatter_add_(-1, index, -here.to(result.dtype).unsqueeze(-1))
        return result.mul_((used * gradient).unsqueeze(-1)), None, None, None
