"""A family's rules applied to one model: each Hugging Face tensor with its shape and the canonical tensors inside it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from mpsdk.description import ModelDescription, TensorDescription
from mpsdk.errors import MpsdkError
from mpsdk.families.rules import WeightRule

Slices = tuple[slice, ...]
T = TypeVar("T", bound=np.generic)


@dataclass(frozen=True)
class HfTensor:
    """A Hugging Face tensor: `parts` joined along dimension 0, `groups` times by turns, then transposed if said."""

    name: str
    parts: tuple[TensorDescription, ...]
    transpose: bool = False
    groups: int = 1

    @property
    def shape(self) -> tuple[int, ...]:
        joined = (sum(part.shape[0] for part in self.parts), *self.parts[0].shape[1:])
        return joined[::-1] if self.transpose else joined

    @property
    def tied(self) -> bool:
        """It repeats another tensor: transformers neither needs nor writes it."""
        return all(part.tied_to is not None for part in self.parts)

    def pieces(
        self, part: TensorDescription, offset: tuple[int, ...], shape: tuple[int, ...]
    ) -> Iterator[tuple[Slices, Slices]]:
        """Where a slice of one part lies: pairs of (index into this tensor, index into the slice).

        A piece read from this tensor has the slice's orientation after `turn`.
        """
        before = sum(other.shape[0] for other in self.parts[: self.parts.index(part)]) // self.groups
        stride = sum(other.shape[0] for other in self.parts) // self.groups
        unit = part.shape[0] // self.groups
        columns = tuple(slice(start, start + size) for start, size in zip(offset[1:], shape[1:], strict=True))
        row, end = offset[0], offset[0] + shape[0]
        while row < end:
            group, within = divmod(row, unit)
            rows = min(unit - within, end - row)
            start = group * stride + before + within
            here = (slice(start, start + rows), *columns)
            yield here[::-1] if self.transpose else here, (slice(row - offset[0], row - offset[0] + rows),)
            row += rows

    def turn(self, values: NDArray[T]) -> NDArray[T]:
        """From this tensor's orientation to the parts', or back."""
        return values.T if self.transpose else values


def hf_tensors(rules: Sequence[WeightRule], description: ModelDescription) -> tuple[HfTensor, ...]:
    """Every tensor that a Hugging Face checkpoint of this model consists of, in the order of rules, block by block.

    Raises:
        MpsdkError: the rules leave out a canonical tensor, use one twice, or know only some of a joined tensor's parts.
    """
    tensors = {tensor.name: tensor for tensor in description.tensors()}
    found: list[HfTensor] = []
    spec = description.spec
    applying = [rule for rule in rules if spec is None or rule.tied in (None, spec.tied)]
    for rule, block in _in_order(applying, len(description.blocks)):
        names = [name.format(block=block) for name in rule.canonical]
        known = [tensors.pop(name) for name in names if name in tensors]
        if not known:
            continue
        hf = rule.hf.format(block=block)
        if len(known) != len(names):
            raise MpsdkError(f"rule {rule.hf!r}: {hf!r} joins {names}, and the model has only some of these")
        found.append(HfTensor(hf, tuple(known), rule.transpose, _groups(rule, description)))
    if tensors:
        raise MpsdkError(f"no weight rule of {description.name!r} covers {sorted(tensors)}")
    return tuple(found)


def _in_order(rules: Sequence[WeightRule], blocks: int) -> Iterator[tuple[WeightRule, int]]:
    """Rules without a block where they stand; a run of rules with one is repeated for each block."""
    run: list[WeightRule] = []
    for rule in (*rules, None):
        if rule is not None and "{block}" in rule.hf:
            run.append(rule)
            continue
        yield from ((repeated, block) for block in range(blocks) for repeated in run)
        run = []
        if rule is not None:
            yield rule, 0


def _groups(rule: WeightRule, description: ModelDescription) -> int:
    if rule.interleaved_by is None:
        return 1
    if description.spec is None:
        raise MpsdkError(
            f"rule {rule.hf!r} counts {rule.interleaved_by}, and {description.name!r} has no spec"
        )
    groups: int = getattr(description.spec, rule.interleaved_by)
    return groups
