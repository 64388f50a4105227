"""Boxes: rectangular pieces of a tensor. Splitting a piece into chunks, and checking that pieces tile a tensor.

A box is (offset, shape), both one number a dimension; it covers `offset[d] <= i < offset[d] + shape[d]`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple


class Box(NamedTuple):
    offset: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    def fits(self, whole: tuple[int, ...]) -> bool:
        """Whether the box lies inside a tensor of shape `whole`."""
        if not len(self.offset) == len(self.shape) == len(whole):
            return False
        return all(
            start >= 0 and size >= 0 and start + size <= bound
            for start, size, bound in zip(self.offset, self.shape, whole, strict=True)
        )

    def overlap(self, other: Box) -> Box | None:
        """The box that both cover, None when they share no element."""
        starts = tuple(map(max, self.offset, other.offset))
        ends = tuple(
            min(a + m, b + n)
            for a, m, b, n in zip(self.offset, self.shape, other.offset, other.shape, strict=True)
        )
        if any(end <= start for start, end in zip(starts, ends, strict=True)):
            return None
        return Box(starts, tuple(end - start for start, end in zip(starts, ends, strict=True)))

    def slices_in(self, outer: Box) -> tuple[slice, ...]:
        """Where this box stands in an array that holds `outer`."""
        return tuple(
            slice(start - base, start - base + size)
            for start, base, size in zip(self.offset, outer.offset, self.shape, strict=True)
        )

    def __str__(self) -> str:
        spans = (f"{start}:{start + size}" for start, size in zip(self.offset, self.shape, strict=True))
        return f"[{', '.join(spans)}]"


def split(shape: tuple[int, ...], limit: int) -> Iterator[Box]:
    """Cut a tensor of `shape` into boxes of at most `limit` elements, in memory order and each one contiguous.

    Whole rows of dimension 0 as long as one row is small enough, else the rows one by one, each cut likewise.
    A tensor without elements gives no box.
    """
    if 0 in shape:
        return
    if not shape:
        yield Box((), ())
        return
    row = math.prod(shape[1:])
    if row <= limit or len(shape) == 1:
        rows = max(1, limit // row)
        for start in range(0, shape[0], rows):
            yield Box((start, *(0 for _ in shape[1:])), (min(rows, shape[0] - start), *shape[1:]))
        return
    for start in range(shape[0]):
        for inner in split(shape[1:], limit):
            yield Box((start, *inner.offset), (1, *inner.shape))


class Fault(NamedTuple):
    """A box that `times` pieces cover, where exactly one should: 0 is a hole, 2 or more an overlap."""

    box: Box
    times: int


def tiling_faults(shape: tuple[int, ...], boxes: Sequence[Box]) -> list[Fault]:
    """Holes and overlaps of `boxes` in a tensor of `shape`; empty when every element is covered exactly once.

    The boxes must fit the shape. Dimension 0 is cut into slabs at every start and end, and each slab is a tiling of one
    dimension less.
    """
    return list(_faults(shape, [box for box in boxes if box.elements]))


def _faults(shape: tuple[int, ...], boxes: list[Box]) -> Iterator[Fault]:
    if 0 in shape:
        return
    if not boxes or not shape:
        if len(boxes) != 1:
            yield Fault(Box((0,) * len(shape), shape), len(boxes))
        return
    waiting = sorted(boxes, key=lambda box: box.offset[0], reverse=True)
    cuts = {0, shape[0]}
    for box in boxes:
        cuts.update((box.offset[0], box.offset[0] + box.shape[0]))
    edges = sorted(cuts)
    active: list[Box] = []
    for start, end in itertools.pairwise(edges):
        active = [box for box in active if box.offset[0] + box.shape[0] > start]
        while waiting and waiting[-1].offset[0] == start:
            active.append(waiting.pop())
        inner = [Box(box.offset[1:], box.shape[1:]) for box in active]
        for fault in _faults(shape[1:], inner):
            box = Box((start, *fault.box.offset), (end - start, *fault.box.shape))
            yield Fault(box, fault.times)
