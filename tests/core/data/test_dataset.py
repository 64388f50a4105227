"""Datasets: how tokens become samples, the held-out tail, what opening refuses."""

from __future__ import annotations

import json
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpsdk.data import BytesTokenizer, Dataset, prepare, split_validation, unigram_entropy
from mpsdk.errors import DataError
from tests.core.data.samples import dataset_of_samples


@pytest.fixture
def prepared(tmp_path):
    text = "To be, or not to be, that is the question.\n" * 5
    (tmp_path / "a.txt").write_text(text)
    return prepare(
        tmp_path / "a.txt", tokenizer=BytesTokenizer(), sequence_length=16, cache_directory=tmp_path / "cache"
    )


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(1, 9), st.data())
def test_labels_are_the_next_tokens(samples, sequence_length, data):
    dataset = dataset_of_samples(samples, sequence_length)
    indices = np.array(data.draw(st.lists(st.integers(0, samples - 1), max_size=5)), dtype=np.int64)
    rows = dataset.rows(indices)
    expected = indices[:, None] * sequence_length + np.arange(sequence_length)
    assert np.array_equal(rows["input_ids"], expected)
    assert np.array_equal(rows["labels"], expected + 1)


@settings(deadline=None)
@given(st.integers(2, 300), st.floats(0.001, 0.999))
def test_the_parts_of_a_split_are_the_whole_and_share_no_label(samples, fraction):
    dataset = dataset_of_samples(samples, sequence_length=3)
    try:
        train, validation = split_validation(dataset, fraction)
    except DataError:
        assert round(fraction * samples) == samples
        return
    assert len(validation) == max(1, round(fraction * samples))
    labels = [part.rows(np.arange(len(part)))["labels"].ravel() for part in (train, validation)]
    assert np.concatenate(labels).tolist() == list(range(1, samples * 3 + 1))
    assert len({dataset.fingerprint, train.fingerprint, validation.fingerprint}) == 3


def test_opening_a_part_is_splitting_the_whole(prepared):
    train, validation = split_validation(prepared, 0.25)
    for part, expected in (("train", train), ("validation", validation)):
        opened = Dataset.open(prepared.path, 16, part=part, validation_fraction=0.25)
        assert opened.fingerprint == expected.fingerprint
        everything = np.arange(len(opened))
        assert np.array_equal(opened.rows(everything)["labels"], expected.rows(everything)["labels"])


def test_another_process_that_opens_the_folder_sees_the_same_samples(prepared):
    opened = Dataset.open(prepared.path, 16)
    assert opened.fingerprint == prepared.fingerprint
    assert np.array_equal(opened.rows(np.arange(3))["input_ids"], prepared.rows(np.arange(3))["input_ids"])
    assert len(opened) == (5 * 43 + 1 - 1) // 16
    assert opened.tokens == len(opened) * 16
    assert opened.vocab_size == 257


def test_the_sequence_length_is_part_of_the_fingerprint_but_not_of_the_folder(prepared):
    other = Dataset.open(prepared.path, 8)
    assert other.fingerprint != prepared.fingerprint
    assert other.path == prepared.path


def test_rows_are_fresh_and_the_file_is_read_only(prepared):
    prepared.rows(np.array([0]))["input_ids"][:] = 0
    assert prepared.rows(np.array([0]))["input_ids"].any()
    with pytest.raises(ValueError, match="read-only"):
        prepared.token_ids[0] = 0


@pytest.mark.parametrize("index", [-1, 13])
def test_an_index_outside_is_refused(prepared, index):
    assert len(prepared) == 13
    with pytest.raises(IndexError, match=r"\[0, 13\)"):
        prepared.rows(np.array([0, index]))


def test_the_last_possible_sequence_length_works_and_the_next_says_so(prepared):
    assert len(Dataset.open(prepared.path, 215)) == 1
    with pytest.raises(DataError, match=r"216 tokens, too few .* at most 215"):
        Dataset.open(prepared.path, 216)


def test_damage_is_told_from_absence(prepared, tmp_path):
    with pytest.raises(DataError, match="not a prepared dataset"):
        Dataset.open(tmp_path / "nowhere", 16)
    tokens = prepared.path / "tokens.bin"
    tokens.write_bytes(tokens.read_bytes()[:-2])
    with pytest.raises(DataError, match=r"damaged: it has 430 bytes and should have 432; delete"):
        Dataset.open(prepared.path, 16)
    tokens.unlink()
    with pytest.raises(DataError, match="it has 0 bytes"):
        Dataset.open(prepared.path, 16)
    header = json.loads((prepared.path / "dataset.json").read_text())
    (prepared.path / "dataset.json").write_text(json.dumps({**header, "version": 99}))
    with pytest.raises(DataError, match="another version"):
        Dataset.open(prepared.path, 16)
    (prepared.path / "dataset.json").write_text("[]")
    with pytest.raises(DataError, match="unreadable"):
        Dataset.open(prepared.path, 16)


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, math.nan])
def test_a_fraction_that_splits_nothing_is_refused(prepared, fraction):
    with pytest.raises(DataError, match="between 0 and 1"):
        Dataset.open(prepared.path, 16, part="validation", validation_fraction=fraction)


def test_a_split_must_leave_something_to_train_on(prepared):
    with pytest.raises(DataError, match="leaves none to train on"):
        Dataset.open(prepared.path, 16, validation_fraction=0.99)
    with pytest.raises(DataError, match="at least 1, not 0"):
        Dataset.open(prepared.path, 0)


def test_unigram_entropy_is_that_of_the_labels(prepared):
    labels = prepared.rows(np.arange(len(prepared)))["labels"].ravel().tolist()
    expected = -sum(n / len(labels) * math.log(n / len(labels)) for n in Counter(labels).values())
    assert unigram_entropy(prepared) == pytest.approx(expected, rel=1e-12)
    _, validation = split_validation(prepared, 0.3)
    assert unigram_entropy(validation) != unigram_entropy(prepared)


def test_unigram_entropy_of_equally_frequent_tokens_is_the_logarithm_of_their_number():
    assert unigram_entropy(dataset_of_samples(64, 4)) == pytest.approx(math.log(256), rel=1e-12)
