"""Batches for training and evaluation: shapes, equality over layouts, complete evaluation."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpsdk.backend import IGNORED_LABEL
from mpsdk.data import Labelling, Labels, SampleStream, evaluation_batches, training_batch
from tests.core.data.labelled import REVIEW_LABELS, REVIEWS, prepared
from tests.core.data.samples import dataset_of_samples

WORDS = Labelling(Labels(2), words=True)

small = st.integers(1, 3)


@settings(deadline=None)
@given(st.integers(1, 50), small, small, small, small, st.integers(0, 200))
def test_the_ranks_of_any_layout_together_hold_the_global_batch(
    samples, accumulation, microbatches, microbatch_size, data_size, consumed
):
    dataset = dataset_of_samples(samples, sequence_length=2)
    stream = SampleStream(len(dataset), dataset.fingerprint, seed=3)
    batches = [
        training_batch(
            dataset,
            stream,
            samples_consumed=consumed,
            accumulation=accumulation,
            microbatches=microbatches,
            microbatch_size=microbatch_size,
            data_rank=rank,
            data_size=data_size,
        )
        for rank in range(data_size)
    ]
    for batch in batches:
        assert set(batch) == {"input_ids", "labels"}
        for array in batch.values():
            assert array.shape == (accumulation, microbatches, microbatch_size, 2)
            assert array.dtype == np.int32 and array.flags.c_contiguous
    rows = np.concatenate([batch["input_ids"].reshape(-1, 2) for batch in batches])
    expected = stream.indices(consumed, accumulation * microbatches * microbatch_size * data_size)
    assert (rows[:, 0] // 2).tolist() == expected.tolist()


@settings(deadline=None)
@given(st.integers(1, 60), small, small, small, st.integers(1, 5))
def test_evaluation_covers_each_sample_exactly_once_in_equally_many_batches(
    samples, accumulation, microbatches, microbatch_size, data_size
):
    dataset = dataset_of_samples(samples)
    ranks = [
        list(
            evaluation_batches(
                dataset,
                accumulation=accumulation,
                microbatches=microbatches,
                microbatch_size=microbatch_size,
                data_rank=rank,
                data_size=data_size,
            )
        )
        for rank in range(data_size)
    ]
    global_batch = accumulation * microbatches * microbatch_size * data_size
    assert {len(batches) for batches in ranks} == {-(-samples // global_batch)}
    seen = []
    for batch in (batch for batches in ranks for batch in batches):
        assert batch["labels"].shape == (accumulation, microbatches, microbatch_size, 1)
        valid = batch["labels"] != IGNORED_LABEL
        seen += batch["input_ids"][valid].tolist()
        assert not batch["input_ids"][~valid].any()
    assert sorted(seen) == list(range(samples))


@pytest.mark.parametrize("data_size", [1, 2, 4])
def test_evaluation_reads_the_same_global_batches_in_every_layout(data_size):
    dataset = dataset_of_samples(10)
    per_rank = [
        [
            batch["input_ids"].ravel()
            for batch in evaluation_batches(
                dataset,
                accumulation=1,
                microbatches=1,
                microbatch_size=4 // data_size,
                data_rank=rank,
                data_size=data_size,
            )
        ]
        for rank in range(data_size)
    ]
    globally = [np.concatenate(parts).tolist() for parts in zip(*per_rank, strict=True)]
    assert globally == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 0, 0]]


@pytest.mark.parametrize(("labelling", "width"), [(REVIEW_LABELS, ()), (WORDS, (24,))])
def test_rows_beyond_the_last_one_have_one_token_and_no_label(labelling, width, tmp_path):
    rows = [{"text": ["a", "b"], "label": [0, 1]} if labelling.words else {"text": "ab", "label": 1}] * 5
    dataset = prepared(rows, tmp_path, labelling)
    batches = list(
        evaluation_batches(
            dataset, accumulation=1, microbatches=2, microbatch_size=2, data_rank=1, data_size=2
        )
    )
    (batch,) = batches  # of 8 rows the second rank has the last four, of which one is there
    assert batch["labels"].shape == (1, 2, 2, *width)
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (1, 2, 2, 24)
    flat = {name: array.reshape(4, -1) for name, array in batch.items()}
    assert (flat["labels"][1:] == IGNORED_LABEL).all() and (flat["labels"][0] != IGNORED_LABEL).any()
    assert flat["attention_mask"][1:].tolist() == [[1, *[0] * 23]] * 3
    assert not flat["input_ids"][1:].any() and not flat["token_type_ids"].any()


def test_a_batch_has_the_arrays_that_are_asked_for(tmp_path):
    dataset = prepared(REVIEWS, tmp_path, REVIEW_LABELS)
    stream = SampleStream(len(dataset), dataset.fingerprint, seed=0)
    layout = {"accumulation": 2, "microbatches": 1, "microbatch_size": 1, "data_rank": 0, "data_size": 2}
    names = ("input_ids", "labels", "attention_mask")
    batch = training_batch(dataset, stream, samples_consumed=0, arrays=names, **layout)
    assert {name: array.shape for name, array in batch.items()} == {
        "input_ids": (2, 1, 1, 24),
        "labels": (2, 1, 1),
        "attention_mask": (2, 1, 1, 24),
    }
    (evaluated,) = evaluation_batches(dataset, arrays=names, **layout)
    assert set(evaluated) == set(names)
