"""ModelDescription: what `resolve` needs to know of a model, without any framework.

A model is an embedding part, a row of blocks, and a head part. Blocks of one kind share one list of tensors, so that a
description stays small however deep the model is.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from mpsdk.families.spec import TransformerSpec

Role = Literal["vocab", "column", "row", "part", "replicated"]
Part = Literal["embedding", "block", "head"]
BLOCK_PREFIX = "blocks.{block}."


class Initial(BaseModel):
    """How a tensor starts: a normal distribution with standard deviation `std`, a constant, or as the model's own factory
    gives it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["normal", "zeros", "ones", "given"]
    std: float = 0.0


class TensorDescription(BaseModel):
    """One canonical tensor: its name, global shape, and how tensor parallelism cuts it.

    `role`: `vocab` and `column` cut dimension 0 (a column-parallel weight is (out, in)), `row` cuts dimension 1, `part` cuts
    the `dimension` that a layer's parallel twin says, `replicated` is whole on every tensor-parallel rank. A cut falls
    between `units` equal parts (attention heads, say), named `unit` in messages. `vocab` is padded instead.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    shape: tuple[int, ...]
    role: Role
    part: Part
    block: int | None = None
    dimension: int | None = None
    units: int | None = None
    unit: str | None = None
    decay: bool = True  # weight decay applies (not to biases and norms)
    trainable: bool = True
    of_heads: bool = False  # whole on every tensor-parallel rank, which uses it for its own heads alone
    initial: Initial
    tied_to: str | None = None  # the canonical name of the owner, when this is the same tensor

    @property
    def cut_dimension(self) -> int | None:
        """The dimension that tensor parallelism cuts, None when replicated."""
        return {"vocab": 0, "column": 0, "row": 1, "part": self.dimension, "replicated": None}[self.role]

    def sums_gradient(self, *, sequence_parallel: bool) -> bool:
        """Whether a tensor-parallel rank finds a part of its gradient only: it is used for a part of the heads, or, under
        sequence parallelism, of the sequence."""
        return self.cut_dimension is None and (self.of_heads or sequence_parallel)

    @property
    def elements(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count


class ModelDescription(BaseModel):
    """A model as `resolve` sees it. Canonical names of a kind are relative; `tensors()` gives them in full. Names of
    naming "module" are full names everywhere, so that each block is of a kind of its own."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    spec: TransformerSpec | None = None  # families only
    naming: Literal["canonical", "module"] = "canonical"
    factory: str | None = None  # "package.module:callable" that makes the model; None for families
    uncut: tuple[
        tuple[str, str, str], ...
    ] = ()  # layers that tensor parallelism is to cut and can't: field, found, why
    max_positions: int | None = None
    vocab_size: int | None = None
    embedding: tuple[TensorDescription, ...]
    kinds: dict[str, tuple[TensorDescription, ...]]
    blocks: tuple[str, ...] = Field(min_length=1)  # the kind of each block
    head: tuple[TensorDescription, ...]

    def block_tensors(self, block: int) -> Iterator[TensorDescription]:
        """The tensors of block number `block`, under their full names."""
        prefix = BLOCK_PREFIX.format(block=block) if self.naming == "canonical" else ""
        for tensor in self.kinds[self.blocks[block]]:
            yield tensor.model_copy(update={"name": prefix + tensor.name, "block": block})

    def tensors(self) -> Iterator[TensorDescription]:
        """All tensors: the embedding's, the blocks' in order, the head's. A tied tensor appears again, with `tied_to`."""
        yield from self.embedding
        for block in range(len(self.blocks)):
            yield from self.block_tensors(block)
        yield from self.head

    @property
    def parameters(self) -> int:
        """Number of parameters, a tied tensor counted once."""
        outside = sum(t.elements for t in (*self.embedding, *self.head) if t.tied_to is None)
        size_of = {kind: sum(t.elements for t in tensors) for kind, tensors in self.kinds.items()}
        return outside + sum(size_of[kind] for kind in self.blocks)
