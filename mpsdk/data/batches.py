"""From sample indices to the arrays that a backend's `step` and `evaluate` take."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from mpsdk.backend import IGNORED_LABEL, Batch
from mpsdk.data.stream import SampleStream


class Samples(Protocol):
    """Rows of one static length that a run trains on or evaluates: text, masked text, or rows with labels."""

    def __len__(self) -> int: ...

    @property
    def fingerprint(self) -> str:
        """Equal for equal samples."""
        ...

    def rows(
        self, indices: NDArray[np.int64], epochs: NDArray[np.int64] | None = None
    ) -> dict[str, NDArray[np.int32]]:
        """The arrays of the rows at `indices`, int32, their first dimension len(indices).

        `epochs`: how often each has been read before, where that makes a difference; None: never.
        Raises IndexError for an index outside [0, len(self)).
        """
        ...


def training_batch(
    dataset: Samples,
    stream: SampleStream,
    *,
    samples_consumed: int,
    accumulation: int,
    microbatches: int,
    microbatch_size: int,
    data_rank: int,
    data_size: int,
    arrays: Collection[str] | None = None,
) -> Batch:
    """One data rank's rows of the step that starts at `samples_consumed`.

    Arrays are int32 of shape (accumulation, microbatches, microbatch_size, sequence_length), labels of rows without the last
    dimension. The data rank's contiguous share of the global batch fills them in that order, so that a global batch holds the
    same samples in every layout. `arrays`: which of them; None: all that there are.
    """
    shape = (accumulation, microbatches, microbatch_size)
    share = accumulation * microbatches * microbatch_size
    indices = stream.rows_of(samples_consumed, share * data_size, data_rank, data_size)
    epochs = stream.epochs(samples_consumed + data_rank * share, share)
    return _folded(dataset.rows(indices, epochs), shape, arrays)


def evaluation_batches(
    dataset: Samples,
    *,
    accumulation: int,
    microbatches: int,
    microbatch_size: int,
    data_rank: int,
    data_size: int,
    arrays: Collection[str] | None = None,
) -> Iterator[Batch]:
    """One data rank's batches of a pass over `dataset`, in its own order; shapes and `arrays` as in `training_batch`.

    Over all data ranks, every sample comes exactly once, and every rank gets the same number of batches, because
    evaluating is collective. Rows beyond the last sample have id 0 and label -100 throughout: they count for nothing. Of such a
    row the first token alone is no padding: a token must have something to attend to.
    """
    shape = (accumulation, microbatches, microbatch_size)
    share = accumulation * microbatches * microbatch_size
    for start in range(data_rank * share, len(dataset) + data_rank * share, share * data_size):
        first, last = min(start, len(dataset)), min(start + share, len(dataset))
        rows = dataset.rows(np.arange(first, last, dtype=np.int64))
        yield _folded(_filled_up(rows, share - (last - first)), shape, arrays)


def _filled_up(rows: dict[str, NDArray[np.int32]], missing: int) -> dict[str, NDArray[np.int32]]:
    filled = {
        name: np.pad(
            values,
            [(0, missing), *[(0, 0)] * (values.ndim - 1)],
            constant_values=IGNORED_LABEL if name == "labels" else 0,
        )
        for name, values in rows.items()
    }
    if missing and "attention_mask" in filled:
        filled["attention_mask"][-missing:, 0] = 1
    return filled


def _folded(
    rows: dict[str, NDArray[np.int32]], shape: tuple[int, int, int], arrays: Collection[str] | None
) -> Batch:
    return {name: rows[name].reshape(*shape, *rows[name].shape[1:]) for name in arrays or rows}
