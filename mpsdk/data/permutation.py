"""A random order of any number of things, as a pure function from position to index.

Nothing is materialised: the order of ten thousand million samples costs ten round keys. Both constructions are from
Black and Rogaway, "Ciphers with Arbitrary Finite Domains" (CT-RSA 2002):

- the generalised Feistel cipher with cycle walking. Write an index as a pair (left, right) in Z_a x Z_b, add in turn to
  one half a keyed random function of the other, and apply it again to whatever falls outside [0, length). Ten rounds, as
  in the cipher of this shape that NIST standardised (FF1, SP 800-38G);
- the prefix cipher, for a few hundred things, where a Feistel network would walk long and be too small to be random:
  draw a random number for each and sort them.

The random function is draw x of SplitMix64 seeded with the round's key (Steele, Lea and Flood, "Fast Splittable
Pseudorandom Number Generators", OOPSLA 2014). Only unsigned 64-bit integer arithmetic and a stable sort are used, so the
order is the same on every platform and numpy version.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

ROUNDS = 10
FEW = 256
"""Up to so many things are sorted by random numbers; beyond, a Feistel network orders them."""
LONGEST = 2**62

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_TOP_BITS = np.uint64(2)


@dataclass(frozen=True)
class Permutation:
    """A bijection of [0, length) onto itself, chosen by `key`; 1 <= length <= 2**62.

    >>> Permutation(5, b"any bytes")(np.arange(5)).tolist()
    [2, 3, 4, 0, 1]
    """

    length: int
    key: bytes

    @cached_property
    def _round_keys(self) -> NDArray[np.uint64]:
        stream = hashlib.shake_256(self.key).digest(8 * ROUNDS)
        return np.frombuffer(stream, dtype="<u8").astype(np.uint64)

    @cached_property
    def _sorted(self) -> NDArray[np.int64]:
        draws = _draw(self._round_keys[0], np.arange(self.length, dtype=np.uint64))
        return np.argsort(draws, kind="stable").astype(np.int64)

    @cached_property
    def _halves(self) -> tuple[np.uint64, np.uint64]:
        """(a, b) with length <= a * b, and hardly more, so that few indices walk."""
        left = math.isqrt(self.length - 1) + 1
        return np.uint64(left), np.uint64(-(-self.length // left))

    def __call__(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """The images of `indices`, a one-dimensional array with values in [0, length)."""
        if self.length <= FEW:
            return self._sorted[indices]
        values = self._encrypt(indices.astype(np.uint64))
        (walking,) = np.nonzero(values >= self.length)
        while walking.size:  # ends: the cycle through an index inside leads back to that index
            values[walking] = self._encrypt(values[walking])
            walking = walking[values[walking] >= self.length]
        return values.astype(np.int64)

    def _encrypt(self, values: NDArray[np.uint64]) -> NDArray[np.uint64]:
        left_size, right_size = self._halves
        left, right = values // right_size, values % right_size
        for key in self._round_keys.reshape(-1, 2):
            left = (left + _draw(key[0], right)) % left_size
            right = (right + _draw(key[1], left)) % right_size
        return left * right_size + right


def _draw(key: np.uint64, counter: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The top 62 bits of draw `counter` of SplitMix64 seeded with `key`: adding a half to them can't overflow."""
    z = counter * _GOLDEN + key
    z = (z ^ (z >> np.uint64(30))) * _MIX_1
    z = (z ^ (z >> np.uint64(27))) * _MIX_2
    return (z ^ (z >> np.uint64(31))) >> _TOP_BITS
