"""From sample indices to the arrays that a backend's `step` and `evaluate` take."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from mpsdk.backend import IGNORED_LABEL, Batch
from mpsdk.data.dataset import Dataset
from mpsdk.data.stream import SampleStream


def training_batch(
    dataset: Dataset,
    stream: SampleStream,
    *,
    samples_consumed: int,
    accumulation: int,
    microbatches: int,
    microbatch_size: int,
    data_rank: int,
    data_size: int,
) -> Batch:
    """One data rank's rows of the step that starts at `samples_consumed`.

    Arrays are int32 of shape (accumulation, microbatches, microbatch_size, sequence_length). The data rank's
    contiguous share of the global batch fills them in that order, so that a global batch holds the same samples in
    every layout.
    """
    shape = (accumulation, microbatches, microbatch_size)
    share = accumulation * microbatches * microbatch_size
    indices = stream.rows_of(samples_consumed, share * data_size, data_rank, data_size)
    return {name: _fold(rows, shape) for name, rows in dataset.rows(indices).items()}


def evaluation_batches(
    dataset: Dataset,
    *,
    accumulation: int,
    microbatches: int,
    microbatch_size: int,
    data_rank: int,
    data_size: int,
) -> Iterator[Batch]:
    """One data rank's batches of a pass over `dataset`, in its own order; shapes as in `training_batch`.

    Over all data ranks, every sample comes exactly once, and every rank gets the same number of batches, because
    evaluating is collective. Rows beyond the last sample have id 0 and label -100 throughout: they count for nothing.
    """
    shape = (accumulation, microbatches, microbatch_size)
    share = accumulation * microbatches * microbatch_size
    for start in range(data_rank * share, len(dataset) + data_rank * share, share * data_size):
        first, last = min(start, len(dataset)), min(start + share, len(dataset))
        rows = dataset.rows(np.arange(first, last, dtype=np.int64))
        padding = share - (last - first)
        yield {
            "input_ids": _fold(_pad(rows["input_ids"], padding, 0), shape),
            "labels": _fold(_pad(rows["labels"], padding, IGNORED_LABEL), shape),
        }


def _pad(rows: NDArray[np.int32], padding: int, value: int) -> NDArray[np.int32]:
    return np.pad(rows, ((0, padding), (0, 0)), constant_values=value)


def _fold(rows: NDArray[np.int32], shape: tuple[int, int, int]) -> NDArray[np.int32]:
    return rows.reshape(*shape, rows.shape[1])
