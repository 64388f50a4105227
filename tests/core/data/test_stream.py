"""The sample stream: what a run reads depends on the seed, the epoch and the data, never on the layout or on history."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpsdk.data import SampleStream
from mpsdk.errors import DataError

streams = st.builds(
    SampleStream,
    length=st.integers(1, 200),
    fingerprint=st.text(max_size=4),
    seed=st.integers(-(2**70), 2**70),
)


def divisors(number):
    return [d for d in range(1, number + 1) if number % d == 0]


@settings(deadline=None)
@given(streams, st.integers(0, 5))
def test_each_epoch_is_a_permutation_of_the_dataset(stream, epoch):
    order = stream.indices(epoch * stream.length, stream.length)
    assert sorted(order.tolist()) == list(range(stream.length))


@settings(deadline=None)
@given(streams, st.integers(0, 1000), st.integers(1, 24), st.integers(1, 3))
def test_every_layout_reads_the_same_global_batches(stream, consumed, global_batch, steps):
    for step in range(steps):
        start = consumed + step * global_batch
        expected = stream.indices(start, global_batch).tolist()
        for data_size in divisors(global_batch):
            shares = [stream.rows_of(start, global_batch, rank, data_size) for rank in range(data_size)]
            assert np.concatenate(shares).tolist() == expected
            assert {share.size for share in shares} == {global_batch // data_size}


@settings(deadline=None)
@given(streams, st.lists(st.integers(1, 300), min_size=1, max_size=8))
def test_a_run_resumed_anywhere_with_any_global_batch_repeats_and_skips_nothing(stream, global_batches):
    consumed, read = 0, []
    for global_batch in global_batches:  # each one a run that was stopped and resumed with another batch size
        resumed = SampleStream(stream.length, stream.fingerprint, stream.seed)
        read += resumed.indices(consumed, global_batch).tolist()
        consumed += global_batch
    assert read == stream.indices(0, consumed).tolist()


@settings(deadline=None)
@given(streams, st.integers(0, 3), st.integers(1, 2))
def test_a_batch_may_cross_the_end_of_an_epoch_or_of_several(stream, epoch, epochs):
    start = epoch * stream.length + stream.length // 2
    whole = stream.indices(epoch * stream.length, (epochs + 2) * stream.length)
    offset = stream.length // 2
    count = epochs * stream.length + 1
    assert stream.indices(start, count).tolist() == whole[offset : offset + count].tolist()


def test_seed_epoch_and_dataset_each_change_the_order():
    stream = SampleStream(1000, "a", 0)
    first = stream.indices(0, 1000).tolist()
    others = [
        stream.indices(1000, 1000),
        SampleStream(1000, "a", 1).indices(0, 1000),
        SampleStream(1000, "b", 0).indices(0, 1000),
        SampleStream(1000, "a", -1).indices(0, 1000),
    ]
    assert all(other.tolist() != first for other in others)


def test_the_order_is_the_one_that_checkpoints_rely_on():
    assert SampleStream(1000, "mpsdk", 0).indices(998, 5).tolist() == [439, 16, 593, 821, 268]
    assert SampleStream(10, "mpsdk", 0).indices(8, 5).tolist() == [3, 8, 5, 9, 0]


def test_ten_thousand_million_samples_cost_nothing_to_shuffle():
    stream = SampleStream(10**10, "web", 7)
    batch = stream.rows_of(123 * 10**9, 4096, 3, 4)
    assert batch.shape == (1024,)
    assert batch.min() >= 0 and batch.max() < 10**10
    assert np.unique(batch).size == 1024


def test_no_samples_asked_none_given():
    assert SampleStream(3, "", 0).indices(5, 0).shape == (0,)


def test_what_cannot_be_shared_or_streamed_is_refused():
    with pytest.raises(DataError, match="multiple of 3"):
        SampleStream(10, "", 0).rows_of(0, 8, 0, 3)
    with pytest.raises(DataError, match="the dataset has 0"):
        SampleStream(0, "", 0)
