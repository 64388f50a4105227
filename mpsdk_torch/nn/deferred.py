"""Linear maps whose weight gradient can wait: the split backward of zero-bubble schedules.

Qi et al. 2024 (arXiv:2401.10241) split a backward into the gradient of the input, which the stage before waits for, and
the gradients of the weights, which nobody waits for. Here the layer itself splits: while `deferring` collects, the
backward of a linear map gives the input's gradient only and leaves the weight's as a call to make later. So the graph is
walked once, and nothing is computed twice. Gradients of biases, norms and embeddings are cheap and stay where they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor

WeightGradients = list[Callable[[], None]]

_collecting: list[WeightGradients] = []


@contextmanager
def deferring(into: WeightGradients) -> Iterator[None]:
    """Within, weight gradients of deferrable maps are added to `into` instead of being computed."""
    _collecting.append(into)
    try:
        yield
    finally:
        _collecting.pop()


def deferrable_linear(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear`, whose weight gradient can be deferred. `weight` must be a leaf.

    Compiled programs leave it out: a graph's backward gives every gradient that its forward asked for, and can't hold a call
    that is made later.
    """
    return _DeferrableLinear.apply(inputs, weight, bias)


class _DeferrableLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(inputs, weight)
        ctx.leaf = weight  # the parameter itself, whose .grad a deferred call adds to
        return functional.linear(inputs, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        inputs, weight = ctx.saved_tensors
        of_inputs = gradient.matmul(weight) if ctx.needs_input_grad[0] else None
        of_bias = gradient.flatten(0, -2).sum(0) if ctx.needs_input_grad[2] else None
        if not ctx.needs_input_grad[1]:
            return of_inputs, None, of_bias
        if _collecting:
            _collecting[-1].append(partial(_add_weight_gradient, ctx.leaf, gradient, inputs))
            return of_inputs, None, of_bias
        return of_inputs, _weight_gradient(gradient, inputs), of_bias


def _weight_gradient(gradient: Tensor, inputs: Tensor) -> Tensor:
    return gradient.flatten(0, -2).t().mm(inputs.flatten(0, -2))


@torch.no_grad()
def _add_weight_gradient(leaf: Tensor, gradient: Tensor, inputs: Tensor) -> None:
    if leaf.grad is None:
        leaf.grad = _weight_gradient(gradient, inputs)
    else:
        leaf.grad.addmm_(gradient.flatten(0, -2).t(), inputs.flatten(0, -2))
