"""The order in which training reads its samples, as arithmetic (design decision 7).

The stream is the concatenation of one permutation an epoch, without end. A training run stands at a position in it,
`samples_consumed`, and that number is the whole state of its data: a step takes the next `global_batch` samples, also
across the end of an epoch, and each data rank takes its contiguous share of them. So a run may be resumed at any
sample, with another layout or another global batch, and repeats and skips nothing.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mpsdk.data.permutation import LONGEST, Permutation
from mpsdk.errors import DataError

_PURPOSE = "mpsdk sample order 1"


@dataclass(frozen=True)
class SampleStream:
    """An endless stream of the indices of a dataset of `length` samples.

    The order of an epoch is a function of (seed, epoch, fingerprint, length) and of nothing else.
    Raises DataError when `length` is below 1.

    >>> stream = SampleStream(length=4, fingerprint="example", seed=0)
    >>> sorted(stream.indices(0, 4).tolist()), sorted(stream.indices(4, 4).tolist())
    ([0, 1, 2, 3], [0, 1, 2, 3])
    """

    length: int
    fingerprint: str
    seed: int

    def __post_init__(self) -> None:
        if not 1 <= self.length <= LONGEST:
            raise DataError(f"a sample stream needs 1 to 2**62 samples; the dataset has {self.length}")

    def indices(self, start: int, count: int) -> NDArray[np.int64]:
        """The dataset indices of the `count` samples from position `start` on; shape (count,)."""
        end = start + count
        parts: list[NDArray[np.int64]] = []
        while start < end:
            epoch, first = divmod(start, self.length)
            last = min(self.length, first + end - start)
            parts.append(self._epoch(epoch)(np.arange(first, last, dtype=np.int64)))
            start += last - first
        return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)

    def rows_of(
        self, samples_consumed: int, global_batch: int, data_rank: int, data_size: int
    ) -> NDArray[np.int64]:
        """The dataset indices of one data rank's contiguous share of the next global batch.

        Shape (global_batch // data_size,). The shares of all data ranks, in order, are the global batch.
        Raises DataError when `data_size` doesn't divide `global_batch`.
        """
        share, rest = divmod(global_batch, data_size)
        if rest:
            raise DataError(
                f"a global batch of {global_batch} samples can't be shared equally by {data_size} data ranks; "
                f"use a multiple of {data_size}"
            )
        return self.indices(samples_consumed + data_rank * share, share)

    def epochs(self, start: int, count: int) -> NDArray[np.int64]:
        """How often the stream has been through the dataset before each of these samples; shape (count,)."""
        return np.arange(start, start + count, dtype=np.int64) // self.length

    def _epoch(self, epoch: int) -> Permutation:
        key = json.dumps([_PURPOSE, self.seed, epoch, self.fingerprint])
        return Permutation(self.length, key.encode())
