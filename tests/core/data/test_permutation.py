"""The order of an epoch: a bijection, uniform over keys, the same everywhere."""

from __future__ import annotations

import hashlib
import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpsdk.data.permutation import LONGEST, Permutation

MASK = 2**64 - 1


def splitmix(seed: int, draw: int) -> int:
    """Draw `draw` (from 1) of SplitMix64, as published."""
    z = (seed + draw * 0x9E3779B97F4A7C15) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def reference(index: int, length: int, key: bytes) -> int:
    """The same construction in Python's own integers, one index at a time, from the description in the module."""
    stream = hashlib.shake_256(key).digest(80)
    keys = [int.from_bytes(stream[8 * i : 8 * i + 8], "little") for i in range(10)]
    if length <= 256:
        return sorted(range(length), key=lambda draw: splitmix(keys[0], draw) >> 2)[index]
    a = math.isqrt(length)
    a += a * a < length
    b = (length + a - 1) // a
    while True:
        left, right = divmod(index, b)
        for number, round_key in enumerate(keys):
            if number % 2 == 0:
                left = (left + (splitmix(round_key, right) >> 2)) % a
            else:
                right = (right + (splitmix(round_key, left) >> 2)) % b
        index = left * b + right
        if index < length:
            return index


def test_the_reference_draws_the_published_numbers():
    # The first outputs for seed 1234567, as in Rosetta Code's task "Pseudo-random numbers/Splitmix64".
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert [splitmix(1234567, draw) for draw in (1, 2, 3)] == published


@settings(deadline=None)
@given(st.integers(1, 5000), st.binary(max_size=8))
def test_every_index_comes_exactly_once(length, key):
    order = Permutation(length, key)(np.arange(length))
    assert np.array_equal(np.sort(order), np.arange(length))


@settings(deadline=None)
@given(st.integers(1, LONGEST), st.binary(max_size=8), st.data())
def test_it_equals_a_plain_python_reference_up_to_2_to_the_62(length, key, data):
    indices = data.draw(st.lists(st.integers(0, length - 1), min_size=1, max_size=4))
    images = Permutation(length, key)(np.array(indices, dtype=np.int64))
    assert images.tolist() == [reference(index, length, key) for index in indices]


@settings(deadline=None)
@given(st.integers(1, 10**12), st.binary(max_size=8), st.data())
def test_an_index_has_the_same_image_alone_and_among_others(length, key, data):
    indices = np.array(data.draw(st.lists(st.integers(0, length - 1), max_size=20)), dtype=np.int64)
    permutation = Permutation(length, key)
    alone = [int(permutation(indices[i : i + 1])[0]) for i in range(len(indices))]
    assert permutation(indices).tolist() == alone


def test_the_order_is_the_one_that_checkpoints_rely_on():
    # Written down once. If this fails, runs can't be resumed where they stood: that takes a new version, not a new list.
    assert Permutation(5, b"any bytes")(np.arange(5)).tolist() == [2, 3, 4, 0, 1]
    assert Permutation(1000, b"mpsdk")(np.arange(6)).tolist() == [547, 731, 480, 533, 680, 224]
    assert Permutation(10**12, b"mpsdk")(np.arange(3)).tolist() == [572873645583, 181748554513, 226487746277]


@pytest.mark.parametrize(("length", "per_order"), [(2, 400), (3, 400), (4, 200), (5, 30), (6, 10)])
def test_every_order_of_a_few_things_is_equally_likely(length, per_order):
    orders = {order: 0 for order in itertools.permutations(range(length))}
    for number in range(len(orders) * per_order):
        orders[tuple(Permutation(length, str(number).encode())(np.arange(length)).tolist())] += 1
    assert_uniform(np.array(list(orders.values())))


@pytest.mark.parametrize("length", [97, 256, 257, 400])
def test_positions_and_neighbours_are_uniform(length):
    identity = np.arange(length)
    orders = np.array([Permutation(length, str(number).encode())(identity) for number in range(2000)])
    for position in (0, length // 2, length - 1):
        assert_uniform(np.bincount(orders[:, position], minlength=length))
    steps = (orders[:, 1:] - orders[:, :-1]) % length
    assert_uniform(np.bincount(steps.ravel(), minlength=length)[1:])


def test_a_large_order_has_no_trend():
    order = Permutation(200_003, b"trend")(np.arange(200_003))
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.01
    assert (
        np.count_nonzero(order == np.arange(order.size)) < 10
    )  # a random order has one fixed point on average


def assert_uniform(counts):
    """Pearson's chi-square within five standard deviations; the keys are fixed, so this never flickers."""
    expected = counts.sum() / counts.size
    statistic = float(((counts - expected) ** 2 / expected).sum())
    freedom = counts.size - 1
    assert statistic < freedom + 5 * math.sqrt(2 * freedom)
