"""What a batch's labels say of the logits: cross-entropy over a vocabulary that is cut over a tensor-parallel group, whose
logits are never gathered, or over classes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as functional
from torch import Tensor

from mpsdk.backend import IGNORED_LABEL
from mpsdk_torch.comm import TensorGroup, leave_parallel


def cross_entropy_sum(logits: Tensor, labels: Tensor, *, vocab_size: int, group: TensorGroup) -> Tensor:
    """Sum of the token losses, in fp32; a label of -100 adds nothing, padding rows of the vocabulary take no part.

    Memory: fp32 logits are used up, their memory becoming the gradient's; of others one fp32 copy is kept for the backward.

    Shapes: logits (batch, length, rows / t) of this rank's rows, labels (batch, length); a scalar, equal on all ranks
    of the group.
    """
    return _CrossEntropy.apply(logits.flatten(0, -2), labels.flatten(), vocab_size, group)


def class_cross_entropy_sum(logits: Tensor, labels: Tensor, *, group: TensorGroup) -> Tensor:
    """Sum of the losses of a classifier, in fp32; a label of -100 adds nothing.

    Shapes: logits (..., classes), labels (...), of which this rank has its own under sequence parallelism (`own_labels`); a
    scalar, equal on all ranks of the group.
    """
    total = functional.cross_entropy(
        logits.flatten(0, -2).float(), labels.flatten(), ignore_index=IGNORED_LABEL, reduction="sum"
    )
    return (
        leave_parallel(total, replace(group, sequence_parallel=False)) if group.sequence_parallel else total
    )


def own_labels(labels: Tensor, pooled: Tensor | None, *, length: int, group: TensorGroup) -> Tensor:
    """The labels that this rank's logits are for, under sequence parallelism: of the tokens of its part of the sequence.

    Shapes: labels (batch, length), and this rank's part of them; or (batch,) with `pooled`, (batch,), the tokens that they
    are of: -100 where that lies in another part.
    """
    if not group.sequence_parallel:
        return labels
    part = length // group.size
    start = group.rank * part
    if pooled is None:
        return labels[:, start : start + part]
    return labels.masked_fill((pooled < start) | (pooled >= start + part), IGNORED_LABEL)


def confusion(logits: Tensor, labels: Tensor) -> Tensor:
    """(classes, classes): how many of each class (row) the logits take for each class (column)."""
    classes = logits.shape[-1]
    labels, found = labels.flatten(), logits.flatten(0, -2).argmax(dim=-1)
    used = labels != IGNORED_LABEL
    pairs = labels[used] * classes + found[used]
    return torch.bincount(pairs, minlength=classes * classes).view(classes, classes)


class _CrossEntropy(torch.autograd.Function):
    """loss = log(sum exp(z)) - z_label with the sums over the group; gradient softmax(z) - onehot(label), local.

    Two all-reduces where there is a group: the maximum, then the sum of exponentials together with the label's logit
    (Shoeybi et al. 2019, arXiv:1909.08053, section 3).
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, vocab_size: int, group: TensorGroup) -> Tensor:
        tokens, rows = logits.shape
        first = group.rank * rows
        valid = max(0, min(rows, vocab_size - first))  # a rank may hold padding rows alone
        # Nobody else reads the logits: a linear map's backward has no use for its result.
        whole = logits.detach().float()
        exponentials = whole[:, :valid]
        largest = exponentials.new_full((tokens,), torch.finfo(torch.float32).min)
        if valid:
            torch.amax(exponentials, dim=-1, out=largest)
        if group.handle is not None:
            dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group.handle)
        exponentials.sub_(largest.unsqueeze(-1))
        local = labels - first
        here = (local >= 0) & (local < valid)
        index = local.masked_fill(~here, 0).unsqueeze(-1)
        sums = exponentials.new_zeros((2, tokens))
        if valid:
            sums[1] = exponentials.gather(-1, index).squeeze(-1).masked_fill(~here, 0.0)
        torch.sum(exponentials.exp_(), dim=-1, out=sums[0])
        if group.handle is not None:
            dist.all_reduce(sums, group=group.handle)
        used = labels != IGNORED_LABEL
        loss = ((sums[0].log() - sums[1]) * used).sum()
        if valid:  # what is left for the backward: the gradient, but for one factor a token
            exponentials.scatter_add_(-1, index, -(here * sums[0]).unsqueeze(-1))
        whole[:, valid:].zero_()
        ctx.save_for_backward(whole, used / sums[0])
        ctx.dtype = logits.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        whole, factors = ctx.saved_tensors
        return whole.mul_((factors * gradient).unsqueeze(-1)).to(ctx.dtype), None, None, None
