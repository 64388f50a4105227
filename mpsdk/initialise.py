"""Initial weights by name: every slice of every tensor on its own, the same in each layout, framework and machine.

Element i of a tensor comes from draw i of a counter-based generator, Philox 4x64-10 (Salmon et al. 2011, "Parallel random
numbers: as easy as 1, 2, 3"), whose key is a digest of the seed and the tensor's canonical name. A draw becomes normal by
inverting the distribution function (`normal_quantile`), with nothing but additions, multiplications, divisions and square
roots, which IEEE 754 fixes to the last bit; libraries' own logarithms and cosines differ between processors.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping

import numpy as np
from numpy.typing import NDArray

from mpsdk.backend import WEIGHT
from mpsdk.description import Initial, ModelDescription, TensorDescription
from mpsdk.errors import CheckpointError

CHUNK = 1 << 15  # draws worked on at a time: 256 KiB an array, so that a chunk stays in a core's cache
DRAWS_A_COUNT = 4  # Philox 4x64 gives four 64-bit draws for each value of its counter


class RandomSource:
    """A TensorSource of initial weights.

    Args:
        description: the tensors and how each starts; a tied tensor reads as its owner.
        seed: another seed gives other weights.
    """

    slots: frozenset[str] = frozenset({WEIGHT})

    def __init__(self, description: ModelDescription, seed: int) -> None:
        self._tensors = {tensor.name: tensor for tensor in description.tensors()}
        self._seed = seed
        self.scalars: Mapping[str, float | int] = {}

    def read(
        self, name: str, slot: str, offset: tuple[int, ...], shape: tuple[int, ...]
    ) -> NDArray[np.float32]:
        """The slice of `shape` at `offset` of tensor `name`, equal to that slice of the whole.

        Raises:
            CheckpointError: no such tensor, a slot other than "weight", or a slice that reaches outside the tensor.
        """
        tensor = self._tensor(name)
        if slot != WEIGHT:
            raise CheckpointError(
                f"initial values exist for slot {WEIGHT!r} only, not for {slot!r} of {name!r}"
            )
        if tensor.initial.kind == "given":
            raise CheckpointError(f"the first values of {name!r} come from the model's own factory")
        check_slice(tensor, offset, shape)
        return initial_values(tensor.initial, tensor.shape, offset, shape, key=_key(self._seed, tensor.name))

    def _tensor(self, name: str) -> TensorDescription:
        if name not in self._tensors:
            raise CheckpointError(f"the model has no tensor {name!r}")
        tensor = self._tensors[name]
        return tensor if tensor.tied_to is None else self._tensor(tensor.tied_to)


def check_slice(tensor: TensorDescription, offset: tuple[int, ...], shape: tuple[int, ...]) -> None:
    """Raise CheckpointError unless the slice of `shape` at `offset` lies inside `tensor`."""
    inside = len(offset) == len(shape) == len(tensor.shape) and all(
        start >= 0 and count >= 0 and start + count <= size
        for start, count, size in zip(offset, shape, tensor.shape, strict=True)
    )
    if not inside:
        raise CheckpointError(
            f"slice of shape {shape} at {offset} reaches outside {tensor.name!r} of shape {tensor.shape}"
        )


def initial_values(
    initial: Initial, whole: tuple[int, ...], offset: tuple[int, ...], shape: tuple[int, ...], *, key: int
) -> NDArray[np.float32]:
    """The slice of `shape` at `offset` of a tensor of shape `whole` that starts as `initial` says."""
    if initial.kind != "normal":
        return np.full(shape, 0.0 if initial.kind == "zeros" else 1.0, dtype=np.float32)
    values = np.empty(math.prod(shape), dtype=np.float32)
    done = 0
    for draws in _draws(whole, offset, shape, key=key):
        part = values[done : done + draws.size]
        np.multiply(normal_quantile(draws), initial.std, out=part, casting="same_kind")
        done += draws.size
    return values.reshape(shape)


def _draws(
    whole: tuple[int, ...], offset: tuple[int, ...], shape: tuple[int, ...], *, key: int
) -> Iterator[NDArray[np.uint64]]:
    """The draws of a slice in order, in pieces of about a chunk.

    Whole rows are drawn and then cut to the slice's columns: a draw costs a small part of what making it normal does.
    """
    if 0 in shape:
        return
    inner, size = whole[1:], math.prod(whole[1:])
    columns = tuple(slice(start, start + count) for start, count in zip(offset[1:], shape[1:], strict=True))
    first, rows = (offset[0], shape[0]) if shape else (0, 1)
    step = max(CHUNK // size, 1)
    for row in range(first, first + rows, step):
        count = min(step, first + rows - row)
        if shape[1:] != inner:
            raw = _raw(key, row * size, count * size).reshape(count, *inner)
            yield raw[(slice(None), *columns)].reshape(-1)
            continue
        end = (row + count) * size
        for start in range(row * size, end, CHUNK):
            yield _raw(key, start, min(CHUNK, end - start))


def _raw(key: int, start: int, count: int) -> NDArray[np.uint64]:
    """Draws `start` to `start + count` of the generator with this key."""
    counter, skip = divmod(start, DRAWS_A_COUNT)
    return np.random.Philox(key=key, counter=counter).random_raw(skip + count)[skip:]


def _key(seed: int, name: str) -> int:
    """128 bits from the seed and the name."""
    return int.from_bytes(hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=16).digest(), "little")


# Wichura 1988, "Algorithm AS 241: The percentage points of the normal distribution", PPND7: about 1 part in 10^7.
# Coefficients of numerator and denominator, highest power first.
CENTRE_HALF_WIDTH, CENTRE_SHIFT = 0.425, 0.180625
CENTRE = (
    (5.9109374720e01, 1.5929113202e02, 5.0434271938e01, 3.3871327179e00),
    (6.7187563600e01, 7.8757757664e01, 1.7895169469e01, 1.0),
)
TAIL_SHIFT = 1.6
TAIL = (
    (1.7023821103e-01, 1.3067284816e00, 2.7568153900e00, 1.4234372777e00),
    (1.2021132975e-01, 7.3700164250e-01, 1.0),
)
FAR_TAIL_FROM = 5.0
FAR_TAIL = (
    (1.7337203997e-02, 4.2868294337e-01, 3.0812263860e00, 6.6579051150e00),
    (1.2258202635e-02, 2.4197894225e-01, 1.0),
)


def normal_quantile(draws: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Standard normal values for 64 random bits each: the quantiles at (bits + 1/2) / 2^64."""
    signed = draws.view(np.int64)  # two's complement: a symmetric spread around zero, sign and 63 bits
    centred = (signed + 0.5) * 2.0**-64  # the probability minus one half
    squared = CENTRE_SHIFT - centred * centred
    values = centred * _ratio(CENTRE, squared)

    tails = np.flatnonzero(squared < CENTRE_SHIFT - CENTRE_HALF_WIDTH**2)
    outer = signed[tails]
    # The distance to the nearer end, from the bits themselves: 1 - p would lose the digits that matter here.
    to_end = np.where(outer < 0, outer - np.iinfo(np.int64).min, np.iinfo(np.int64).max - outer)
    root = np.sqrt(-_logarithm((to_end + 0.5) * 2.0**-64))
    size = _ratio(TAIL, root - TAIL_SHIFT)
    far = np.flatnonzero(root > FAR_TAIL_FROM)
    size[far] = _ratio(FAR_TAIL, root[far] - FAR_TAIL_FROM)
    values[tails] = np.where(outer < 0, -size, size)
    return values


def _ratio(
    coefficients: tuple[tuple[float, ...], tuple[float, ...]], x: NDArray[np.float64]
) -> NDArray[np.float64]:
    numerator, denominator = (_polynomial(powers, x) for powers in coefficients)
    numerator /= denominator
    return numerator


def _polynomial(coefficients: tuple[float, ...], x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Horner's rule, highest power first."""
    total = np.full_like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        total *= x
        total += coefficient
    return total


LOG_2 = 0.6931471805599453
ATANH = tuple(2.0 / odd for odd in (15, 13, 11, 9, 7, 5, 3, 1))


def _logarithm(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Natural logarithm in basic operations: log(m 2^e) = e log 2 + 2 atanh((m - 1) / (m + 1)), by its series."""
    mantissa, exponent = np.frexp(x)  # mantissa in [1/2, 1)
    small = mantissa < math.sqrt(0.5)
    mantissa[small] *= 2.0
    exponent = exponent - small
    ratio = (mantissa - 1.0) / (mantissa + 1.0)  # within 0.1716: the series' next term is below 1e-14
    return exponent * LOG_2 + ratio * _polynomial(ATANH, ratio * ratio)
