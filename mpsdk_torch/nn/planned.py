"""Layers of a model that mpsdk did not make, cut where they stand: linear maps, embeddings, and what all ranks repeat.

Each takes what the whole layer took and gives what it gave, or a part of it, as its style says.

| style                          | input         | output        |
|--------------------------------|---------------|---------------|
| `colwise`                      | whole         | own features  |
| `packed_colwise`               | whole         | own features of each of two halves |
| `colwise_gather_output`        | whole         | whole         |
| `rowwise`                      | own features  | whole         |
| `rowwise_split_input`          | whole         | whole         |
| `embedding_rowwise`            | ids           | whole         |
| `embedding_colwise`            | ids           | whole         |
| `replicated_with_grad_allreduce` | own heads   | own heads     |
"""

from __future__ import annotations

import copy
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from mpsdk_torch.comm import TensorGroup, enter_parallel, gather_features, leave_parallel, split_features
from mpsdk_torch.nn.linear import DistributedLinear


class PlannedLinear(DistributedLinear):
    """In the place of an nn.Linear: a `DistributedLinear` that communicates by itself.

    Args:
        whole: column: gather the outputs of all ranks; row: take this rank's part of the input.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        cut: Literal["column", "row"],
        whole: bool,
        bias: bool,
        group: TensorGroup,
    ) -> None:
        super().__init__(in_features, out_features, cut=cut, bias=bias, group=group)
        self.whole = whole

    def forward(self, inputs: Tensor) -> Tensor:
        if self.cut == "row":
            return super().forward(split_features(inputs, self.group) if self.whole else inputs)
        output = super().forward(enter_parallel(inputs, self.group))
        return gather_features(output, self.group) if self.whole else output


def cut_embedding_rows(embedding: nn.Embedding, group: TensorGroup) -> None:
    """Have an embedding look up in this rank's rows, which its weight holds already, and sum over the group.

    Whatever else the module's own forward does to each vector stays.
    """
    whole, rows = embedding.forward, embedding.weight.shape[0]
    start = group.rank * rows
    if embedding.padding_idx is not None:  # the row that gets no gradient
        local = embedding.padding_idx - start
        embedding.padding_idx = local if 0 <= local < rows else None

    def forward(ids: Tensor) -> Tensor:
        local = ids - start
        outside = (local < 0) | (local >= rows)
        found = whole(local.masked_fill(outside, 0))
        return leave_parallel(found.masked_fill(outside.unsqueeze(-1), 0.0), group)

    embedding.forward = forward  # type: ignore[method-assign]


def cut_embedding_features(embedding: nn.Embedding, group: TensorGroup) -> None:
    """Have an embedding look up this rank's features, which its weight holds already, and gather the others'."""
    part = embedding.forward

    def forward(ids: Tensor) -> Tensor:
        return gather_features(part(ids), group)

    embedding.forward = forward  # type: ignore[method-assign]


def sum_gradients(module: nn.Module, group: TensorGroup) -> None:
    """Sum the gradients of a module's own parameters over the group: each rank finds those of its part of the input.

    The sum is in the backward, so that it holds under FSDP and when gradients accumulate.
    """
    alike = copy.copy(module)  # the same parameters, and a forward that is not the one below
    names = [name for name, _ in module.named_parameters(recurse=False)]

    def forward(*args: Any, **kwargs: Any) -> Any:
        # By name: FSDP1 puts plain tensors in the parameters' place.
        summed = {name: enter_parallel(getattr(module, name), group) for name in names}
        return functional_call(alike, summed, args, kwargs)

    module.forward = forward  # type: ignore[method-assign]


def cut_evenly(whole: Tensor, dimension: int, packed: int, size: int) -> list[Tensor]:
    """Each rank's part of a tensor, which holds `packed` tensors one after the other along `dimension`."""
    packs = [pack.chunk(size, dimension) for pack in whole.chunk(packed, dimension)]
    return [torch.cat([pack[rank] for pack in packs], dimension) for rank in range(size)]
