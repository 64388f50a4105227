"""Hidden tokens: as many as they should be, the same in every layout and at every try, others in each epoch."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpsdk.backend import IGNORED_LABEL
from mpsdk.data import (
    BytesTokenizer,
    MaskedText,
    Masking,
    SampleStream,
    evaluation_batches,
    prepare,
    training_batch,
)
from tests.core.data.samples import SHAKESPEARE, dataset_of_samples

MASK, VOCABULARY = 255, 257
SPECIALS = BytesTokenizer.specials


def masking(**changes) -> Masking:
    return Masking(**{"mask": MASK, "vocab_size": VOCABULARY, "special": SPECIALS.ids, **changes})


@pytest.fixture(scope="module")
def hamlet(tmp_path_factory):
    """Windows of 126 bytes."""
    return prepare(
        SHAKESPEARE / "hamlet.txt",
        tokenizer=BytesTokenizer(),
        sequence_length=126,
        cache_directory=tmp_path_factory.mktemp("cache"),
    )


def within(count: int, of: int, probability: float) -> bool:
    """Within five standard deviations of a binomial distribution: once in two million."""
    return abs(count - of * probability) <= 5 * math.sqrt(of * probability * (1 - probability))


@pytest.mark.parametrize("probability", [0.15, 0.4])
def test_so_many_tokens_are_chosen_and_most_of_them_hidden(hamlet, probability):
    chosen = hidden = replaced = kept = 0
    text = MaskedText(hamlet, masking(probability=probability, seed=5))
    indices = np.arange(len(text))
    rows, plain = text.rows(indices), hamlet.rows(indices)["input_ids"]
    asked = rows["labels"] != IGNORED_LABEL
    assert np.array_equal(rows["labels"][asked], plain[asked])
    assert np.array_equal(rows["input_ids"][~asked], plain[~asked])
    read, true = rows["input_ids"][asked], plain[asked]
    chosen, hidden = asked.sum(), (read == MASK).sum()
    replaced = ((read != MASK) & (read != true)).sum()
    kept = (read == true).sum()
    assert within(chosen, plain.size, probability)
    other = 0.1 * (VOCABULARY - 2) / VOCABULARY  # a random token may be the true one, or the mask
    assert within(hidden, chosen, 0.8 + 0.1 / VOCABULARY)
    assert within(replaced, chosen, other)
    assert within(kept, chosen, 0.1 + 0.1 / VOCABULARY)
    assert {*read.tolist()} >= set(range(32, 127))  # random tokens are of the whole vocabulary


def test_every_place_of_a_window_is_chosen_as_often_as_any_other(hamlet):
    text = MaskedText(hamlet, masking(special=()))
    asked = (text.rows(np.arange(len(text)))["labels"] != IGNORED_LABEL).sum(axis=0)
    assert all(within(count, len(text), 0.15) for count in asked)


@settings(deadline=None)
@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=60),
    st.sets(st.integers(0, 9), max_size=6),
    st.floats(0.01, 0.99),
    st.integers(0, 2**63 - 1),
    st.integers(0, 10**6),
    st.integers(0, 10**12),
)
def test_special_tokens_are_never_chosen_and_the_same_is_chosen_again(
    ids, special, probability, seed, epoch, sample
):
    window = np.array(ids, dtype=np.int32)
    how = Masking(mask=99, vocab_size=10, special=tuple(special), probability=probability, seed=seed)
    read, labels = how.corrupt(window, epoch=epoch, sample=sample)
    assert read.dtype == labels.dtype == np.int32
    untouched = np.isin(window, [*special])
    assert np.array_equal(read[untouched], window[untouched])
    assert (labels[untouched] == IGNORED_LABEL).all()
    assert ((labels == window) | (labels == IGNORED_LABEL)).all()
    again = how.corrupt(window, epoch=epoch, sample=sample)
    assert np.array_equal(read, again[0]) and np.array_equal(labels, again[1])


def test_another_seed_epoch_or_sample_hides_something_else():
    window = np.full(200, 65, dtype=np.int32)
    found = [
        masking(seed=seed).corrupt(window, epoch=epoch, sample=sample)[1].tobytes()
        for seed in (0, 1)
        for epoch in (0, 1)
        for sample in (0, 1)
    ]
    assert len(set(found)) == 8


def test_special_tokens_stand_around_each_window_and_are_not_masked(hamlet):
    text = MaskedText(hamlet, masking(prefix=(254,), suffix=(256,), probability=0.9))
    rows = text.rows(np.arange(10))
    assert text.sequence_length == 128
    assert {name: (array.shape, array.dtype) for name, array in rows.items()} == {
        name: ((10, 128), np.dtype(np.int32))
        for name in ("input_ids", "attention_mask", "token_type_ids", "labels")
    }
    assert (rows["input_ids"][:, 0] == 254).all() and (rows["input_ids"][:, -1] == 256).all()
    assert (rows["labels"][:, [0, -1]] == IGNORED_LABEL).all()
    assert rows["attention_mask"].all() and not rows["token_type_ids"].any()


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 12), st.integers(1, 4), st.integers(0, 60), st.integers(1, 3), st.integers(1, 2))
def test_ranks_of_any_layout_together_hide_what_one_alone_does(
    samples, data_size, consumed, microbatches, accumulation
):
    text = MaskedText(dataset_of_samples(samples, sequence_length=8), masking(special=(), probability=0.5))
    stream = SampleStream(len(text), text.fingerprint, seed=1)

    def batch(rank: int, ranks: int, microbatch_size: int):
        return training_batch(
            text,
            stream,
            samples_consumed=consumed,
            accumulation=accumulation,
            microbatches=microbatches,
            microbatch_size=microbatch_size,
            data_rank=rank,
            data_size=ranks,
        )

    alone = batch(0, 1, 2 * data_size)
    together = [batch(rank, data_size, 2) for rank in range(data_size)]
    for name, array in alone.items():
        parts = [part[name].reshape(-1, 8) for part in together]
        assert np.array_equal(np.concatenate(parts), array.reshape(-1, 8))


def test_a_sample_is_masked_anew_in_each_epoch_and_alike_in_each_evaluation():
    text = MaskedText(dataset_of_samples(4, sequence_length=64), masking(special=()))
    stream = SampleStream(len(text), text.fingerprint, seed=0)
    layout = {"accumulation": 1, "microbatches": 1, "microbatch_size": 4, "data_rank": 0, "data_size": 1}
    epochs = [
        training_batch(text, stream, samples_consumed=4 * epoch, **layout)["labels"].reshape(4, 64)
        for epoch in range(3)
    ]
    orders = [stream.indices(4 * epoch, 4) for epoch in range(3)]
    sorted_ = [labels[np.argsort(order)] for labels, order in zip(epochs, orders, strict=True)]
    assert len({labels.tobytes() for labels in sorted_}) == 3
    evaluations = [next(evaluation_batches(text, **layout))["labels"].reshape(4, 64) for _ in range(2)]
    assert np.array_equal(evaluations[0], evaluations[1])
    assert np.array_equal(evaluations[0], sorted_[0])  # that of the first epoch


def test_an_index_outside_is_refused(hamlet):
    with pytest.raises(IndexError):
        MaskedText(hamlet, masking()).rows(np.array([len(hamlet)]))
