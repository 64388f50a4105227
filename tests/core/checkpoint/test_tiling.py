"""Boxes against counting every element in a numpy array."""

from __future__ import annotations

import itertools
import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from mpsdk.checkpoint.tiling import Box, split, tiling_faults

shapes = st.lists(st.integers(0, 6), max_size=3).map(tuple)


@st.composite
def shape_and_boxes(draw: st.DrawFn) -> tuple[tuple[int, ...], list[Box]]:
    shape = draw(shapes)
    boxes: list[Box] = []
    for _ in range(draw(st.integers(0, 6))):
        starts = tuple(draw(st.integers(0, size)) for size in shape)
        sizes = tuple(draw(st.integers(0, size - start)) for start, size in zip(starts, shape, strict=True))
        boxes.append(Box(starts, sizes))
    return shape, boxes


def count(shape: tuple[int, ...], boxes: list[Box]) -> np.ndarray:
    times = np.zeros(shape, int)
    for box in boxes:
        times[box.slices_in(Box((0,) * len(shape), shape))] += 1
    return times


@given(shapes, st.integers(1, 40))
def test_split_covers_every_element_once_in_memory_order(shape: tuple[int, ...], limit: int):
    boxes = list(split(shape, limit))
    assert (count(shape, boxes) == 1).all()
    assert all(0 < box.elements <= limit for box in boxes)
    numbers = np.arange(math.prod(shape)).reshape(shape)
    pieces = [numbers[box.slices_in(Box((0,) * len(shape), shape))].reshape(-1) for box in boxes]
    assert list(itertools.chain.from_iterable(pieces)) == list(range(math.prod(shape)))


def test_split_takes_whole_rows_while_they_are_small_enough():
    assert list(split((10, 4), 12)) == [
        Box((0, 0), (3, 4)),
        Box((3, 0), (3, 4)),
        Box((6, 0), (3, 4)),
        Box((9, 0), (1, 4)),
    ]


def test_split_cuts_a_row_that_is_too_large():
    assert list(split((2, 5), 3)) == [
        Box((0, 0), (1, 3)),
        Box((0, 3), (1, 2)),
        Box((1, 0), (1, 3)),
        Box((1, 3), (1, 2)),
    ]


@given(shape_and_boxes())
def test_faults_are_exactly_the_elements_not_covered_once(case: tuple[tuple[int, ...], list[Box]]):
    shape, boxes = case
    found = np.ones(shape, int)
    for fault in tiling_faults(shape, boxes):
        assert fault.box.elements and fault.times != 1
        found[fault.box.slices_in(Box((0,) * len(shape), shape))] = fault.times
    np.testing.assert_array_equal(found, count(shape, boxes))


@given(shape_and_boxes())
def test_overlap_is_what_both_boxes_cover(case: tuple[tuple[int, ...], list[Box]]):
    shape, boxes = case
    for one, other in itertools.combinations(boxes, 2):
        common = one.overlap(other)
        both = count(shape, [one]) & count(shape, [other])
        np.testing.assert_array_equal(count(shape, [common] if common else []), both)


def test_a_regular_tiling_of_thousands_of_chunks_is_checked_quickly():
    boxes = [Box((4 * row, 8 * column), (4, 8)) for row in range(2000) for column in range(8)]
    assert tiling_faults((8000, 64), boxes) == []
    assert tiling_faults((8000, 64), boxes[:-1]) == [(Box((7996, 56), (4, 8)), 0)]
