"""Initial weights: any slice alone is the slice of the whole, the distribution is right, the bits never change."""

from __future__ import annotations

import hashlib
import math
import statistics
import time
import tracemalloc
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpsdk.backend import TensorSource
from mpsdk.description import Initial, ModelDescription, TensorDescription
from mpsdk.errors import CheckpointError
from mpsdk.initialise import CHUNK, RandomSource, initial_values, normal_quantile

NORMAL = Initial(kind="normal", std=0.02)


def tensor(name: str, shape: tuple[int, ...], initial: Initial = NORMAL, tied_to: str | None = None):
    return TensorDescription(
        name=name, shape=shape, role="replicated", part="embedding", initial=initial, tied_to=tied_to
    )


def source(*tensors: TensorDescription, seed: int = 0) -> RandomSource:
    block = (tensor("attention.query.weight", (4, 4)),)
    description = ModelDescription(
        name="test", embedding=tensors, kinds={"block": block}, blocks=("block", "block"), head=()
    )
    return RandomSource(description, seed)


@st.composite
def slices(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """A whole shape, an offset and a shape inside it; some rows are longer than a chunk."""
    whole = draw(
        st.lists(st.integers(1, 9), min_size=0, max_size=4).map(tuple)
        | st.tuples(st.integers(1, 5), st.integers(CHUNK - 3, CHUNK + 3))
        | st.tuples(st.integers(1, 3 * CHUNK))
    )
    bounds = [sorted((draw(st.integers(0, size)), draw(st.integers(0, size)))) for size in whole]
    return whole, tuple(start for start, _ in bounds), tuple(end - start for start, end in bounds)


@settings(deadline=None)
@given(case=slices(), seed=st.integers(-(2**40), 2**40))
def test_any_slice_equals_that_slice_of_the_whole(
    case: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]], seed: int
):
    whole, offset, shape = case
    weights = source(tensor("w", whole), seed=seed)
    everything = weights.read("w", "weight", (0,) * len(whole), whole)
    part = weights.read("w", "weight", offset, shape)
    index = tuple(slice(start, start + count) for start, count in zip(offset, shape, strict=True))
    assert part.dtype == np.float32 and part.shape == shape
    np.testing.assert_array_equal(part, everything[index])


def test_it_is_a_tensor_source():
    weights = source(tensor("w", (2,)))
    assert isinstance(weights, TensorSource)
    assert (weights.slots, dict(weights.scalars)) == ({"weight"}, {})


def test_values_have_the_moments_and_quantiles_of_a_normal_distribution():
    values = initial_values(Initial(kind="normal", std=1.0), (2_000_000,), (0,), (2_000_000,), key=7).astype(
        np.float64
    )
    error = 1 / math.sqrt(values.size)
    assert abs(values.mean()) < 4 * error
    assert abs(values.var() - 1) < 4 * error * math.sqrt(2)
    assert abs((values**3).mean()) < 4 * error * math.sqrt(15)
    assert abs((values**4).mean() - 3) < 4 * error * math.sqrt(96)
    normal = statistics.NormalDist()
    for probability in (0.001, 0.05, 0.075, 0.25, 0.5, 0.925, 0.999):
        below = (values < normal.inv_cdf(probability)).mean()
        assert abs(below - probability) < 4 * error * math.sqrt(probability * (1 - probability))


def test_neighbours_and_tensors_are_independent():
    weights = source(tensor("a", (1000, 1000)), tensor("b", (1000, 1000)))
    a, b = (weights.read(name, "weight", (0, 0), (1000, 1000)).astype(np.float64) for name in "ab")
    for first, second in ((a[:, 1:], a[:, :-1]), (a[1:], a[:-1]), (a, b)):
        assert abs(np.corrcoef(first.ravel(), second.ravel())[0, 1]) < 4 / 1000


def test_the_quantile_function_is_the_inverse_of_the_distribution():
    edges = [0, 1, 2**20, 2**40, 2**52, 2**62, 2**63 - 1, 2**63, 2**63 + 2**62, 2**64 - 1]
    draws = np.concatenate([np.array(edges, dtype=np.uint64), np.random.Philox(key=1).random_raw(20_000)])
    normal = statistics.NormalDist()
    for value, bits in zip(normal_quantile(draws), draws.view(np.int64), strict=True):
        probability = Fraction(2 * int(bits) + 1, 2**65) + Fraction(1, 2)
        lower = probability < Fraction(1, 2)
        size = -normal.inv_cdf(float(min(probability, 1 - probability)))
        assert value == pytest.approx(-size if lower else size, rel=2e-7, abs=1e-12)


def test_the_bits_never_change():
    """Another value here means that runs begun before can't be repeated, or that this machine's arithmetic differs."""
    weights = source(tensor("embedding.tokens.weight", (50_000, 64)), seed=1234)
    whole = weights.read("embedding.tokens.weight", "weight", (0, 0), (50_000, 64))
    assert [float(value).hex() for value in whole[-1, -2:]] == [
        "0x1.716fac0000000p-9",
        "-0x1.502c960000000p-9",
    ]
    assert hashlib.sha256(whole.astype("<f4").tobytes()).hexdigest() == (
        "6007e8d3904af064f64eec34b9f20aeaedc9ff08bd2636c6aab35f8bbe5d3d42"
    )


def test_seed_and_name_make_the_difference():
    def read(name: str, seed: int) -> list[float]:
        weights = source(tensor("a", (8,)), tensor("b", (8,)), seed=seed)
        return weights.read(name, "weight", (0,), (8,)).tolist()

    assert read("a", 1) == read("a", 1)
    assert not set(read("a", 0)) & set(read("a", 1))
    assert not set(read("a", 0)) & set(read("b", 0))


def test_the_standard_deviation_is_only_a_scale():
    one, two = (
        initial_values(Initial(kind="normal", std=std), (64,), (0,), (64,), key=3) for std in (0.5, 0.25)
    )
    np.testing.assert_array_equal(one, 2 * two)


def test_constants_and_blocks_and_ties():
    weights = source(
        tensor("ones", (3,), Initial(kind="ones")),
        tensor("zeros", (3,), Initial(kind="zeros")),
        tensor("owner", (3, 2)),
        tensor("tied", (3, 2), Initial(kind="ones"), tied_to="owner"),
    )
    assert weights.read("ones", "weight", (1,), (2,)).tolist() == [1, 1]
    assert weights.read("zeros", "weight", (1,), (2,)).tolist() == [0, 0]
    np.testing.assert_array_equal(
        weights.read("tied", "weight", (1, 0), (2, 2)), weights.read("owner", "weight", (1, 0), (2, 2))
    )
    first, second = (
        weights.read(f"blocks.{block}.attention.query.weight", "weight", (0, 0), (4, 4)) for block in (0, 1)
    )
    assert not np.array_equal(first, second)


@pytest.mark.parametrize(
    "name, slot, offset, shape, message",
    [
        ("v", "weight", (0,), (2,), "no tensor 'v'"),
        ("w", "exp_avg", (0,), (2,), "slot 'weight' only"),
        ("w", "weight", (2,), (2,), r"shape \(2,\) at \(2,\) reaches outside 'w' of shape \(3,\)"),
        ("w", "weight", (-1,), (2,), "reaches outside"),
        ("w", "weight", (0, 0), (2, 1), "reaches outside"),
    ],
)
def test_what_does_not_exist_cannot_be_read(
    name: str, slot: str, offset: tuple[int, ...], shape: tuple[int, ...], message: str
):
    with pytest.raises(CheckpointError, match=message):
        source(tensor("w", (3,))).read(name, slot, offset, shape)


def test_memory_is_the_slice_and_a_chunk():
    weights = source(tensor("w", (4096, 4096)))
    weights.read("w", "weight", (0, 0), (8, 8))
    tracemalloc.start()
    values = weights.read("w", "weight", (0, 2048), (4096, 1024))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak - values.nbytes < 24 * CHUNK * 8


def test_a_slice_costs_what_its_size_says_wherever_it_lies():
    """20 million elements a second is the aim; the bound leaves room for a busy machine."""
    weights = source(tensor("w", (1 << 20, 1 << 20)))
    start = time.perf_counter()
    weights.read("w", "weight", ((1 << 20) - 4, 0), (4, 1 << 20))
    assert time.perf_counter() - start < 4.0
