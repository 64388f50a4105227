"""Preparing: once for a content and tokenizer, whole or not at all, by any number of processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from mpsdk.data import BytesTokenizer, cache, prepare
from mpsdk.errors import DataError
from tests.core.data.samples import SHAKESPEARE, Counting, tokens_of


@pytest.fixture
def corpus(tmp_path):
    (tmp_path / "a.txt").write_text("Double, double toil and trouble;\n" * 20)
    return tmp_path / "a.txt"


def prepare_here(source, tmp_path, tokenizer=None, **options):
    return prepare(
        source,
        tokenizer=tokenizer or BytesTokenizer(),
        sequence_length=8,
        cache_directory=tmp_path / "cache",
        **options,
    )


def test_the_second_time_nothing_is_tokenised(corpus, tmp_path):
    tokenizer = Counting()
    first = prepare_here(corpus, tmp_path, tokenizer)
    assert tokenizer.calls == 1
    second = prepare_here(corpus, tmp_path, tokenizer)
    assert tokenizer.calls == 1
    assert (second.path, second.fingerprint) == (first.path, first.fingerprint)
    assert prepare_here(corpus.rename(tmp_path / "b.txt"), tmp_path, tokenizer).path == first.path


def test_another_content_or_tokenizer_is_another_entry(corpus, tmp_path):
    class Other(BytesTokenizer):
        fingerprint = "other"

    paths = {prepare_here(corpus, tmp_path).path, prepare_here(corpus, tmp_path, Other()).path}
    corpus.write_text(corpus.read_text() + ".")
    paths.add(prepare_here(corpus, tmp_path).path)
    assert len(paths) == 3


@pytest.mark.parametrize(("vocab_size", "dtype"), [(1 << 16, "<u2"), ((1 << 16) + 1, "<u4")])
def test_ids_take_two_bytes_where_they_fit(corpus, tmp_path, vocab_size, dtype):
    class Sized(BytesTokenizer):
        end_of_document = vocab_size - 1

    Sized.vocab_size = vocab_size
    dataset = prepare_here(corpus, tmp_path, Sized())
    assert dataset.token_ids.dtype == np.dtype(dtype)
    assert dataset.token_ids.tolist() == [*corpus.read_bytes(), vocab_size - 1]


def test_parts_share_one_entry(corpus, tmp_path):
    train = prepare_here(corpus, tmp_path, validation_fraction=0.1)
    validation = prepare_here(corpus, tmp_path, part="validation", validation_fraction=0.1)
    assert train.path == validation.path
    assert len(train) + len(validation) == len(prepare_here(corpus, tmp_path))


def test_too_short_data_are_named_with_what_would_do(tmp_path):
    (tmp_path / "short.txt").write_text("abc")
    with pytest.raises(DataError, match=r"short\.txt has 4 tokens, too few .* sequence_length of at most 3"):
        prepare_here(tmp_path / "short.txt", tmp_path)


class Failing(BytesTokenizer):
    def encode_many(self, texts):
        raise RuntimeError("tokenizer broke")


def test_a_failure_leaves_nothing_behind(corpus, tmp_path):
    with pytest.raises(RuntimeError, match="tokenizer broke"):
        prepare_here(corpus, tmp_path, Failing())
    assert list((tmp_path / "cache").iterdir()) == []
    assert prepare_here(corpus, tmp_path).token_ids.tolist() == tokens_of(corpus.read_text())


def test_data_that_change_while_they_are_read_are_refused(corpus, tmp_path):
    class Meddling(BytesTokenizer):
        def encode_many(self, texts):
            with corpus.open("a") as file:
                file.write("more")
            return super().encode_many(texts)

    with pytest.raises(DataError, match="changed while it was being read"):
        prepare_here(corpus, tmp_path, Meddling())
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_place_that_cannot_be_written_is_named(corpus, tmp_path):
    (tmp_path / "cache").write_text("a file, not a folder")
    with pytest.raises(DataError, match=r"a\.txt can't be tokenised into .*cache: .*File exists"):
        prepare_here(corpus, tmp_path)


def test_a_dataset_that_cannot_be_committed_is_not_one(corpus, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(DataError, match="No space left on device"):
        patch.setattr(cache.Path, "rename", full)
        prepare_here(corpus, tmp_path)
    assert list((tmp_path / "cache").iterdir()) == []


def test_of_two_preparers_the_first_to_finish_wins(corpus, tmp_path):
    class Overtaken(BytesTokenizer):
        def encode_many(self, texts):
            self.other = prepare_here(corpus, tmp_path)
            return super().encode_many(texts)

    tokenizer = Overtaken()
    late = prepare_here(corpus, tmp_path, tokenizer)
    assert late.path == tokenizer.other.path
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [late.path.name]


PREPARE = """
import sys
from mpsdk.data import BytesTokenizer, prepare
source, cache = sys.argv[1:]
dataset = prepare(source, tokenizer=BytesTokenizer(), sequence_length=128, cache_directory=cache)
print(dataset.path, dataset.fingerprint, int(dataset.token_ids.sum(dtype="int64")))
"""


def start(script, *arguments):
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_processes_that_prepare_at_once_get_the_same_dataset(tmp_path):
    processes = [start(PREPARE, SHAKESPEARE, tmp_path / "cache") for _ in range(4)]
    results = {process.communicate(timeout=60)[0] for process in processes}
    assert [process.returncode for process in processes] == [0] * 4
    assert len(results) == 1
    assert len(list((tmp_path / "cache").iterdir())) == 1


KILLED = """
import sys, time
from mpsdk.data import BytesTokenizer, prepare
class Slow(BytesTokenizer):
    def encode_many(self, texts):
        print("encoding", flush=True)
        time.sleep(60)
prepare(sys.argv[1], tokenizer=Slow(), sequence_length=8, cache_directory=sys.argv[2])
"""


def test_what_a_killed_process_left_is_never_taken_for_a_dataset_and_goes_in_time(corpus, tmp_path):
    process = start(KILLED, corpus, tmp_path / "cache")
    assert process.stdout.readline() == "encoding\n"
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=10)
    (left,) = (tmp_path / "cache").iterdir()
    dataset = prepare_here(corpus, tmp_path)
    assert dataset.token_ids.tolist() == tokens_of(corpus.read_text())
    assert left.exists()  # its writer might be alive, for all that this process knows
    long_ago = time.time() - cache.ABANDONED_AFTER - 60
    for path in (left, *left.iterdir()):
        os.utime(path, (long_ago, long_ago))
    (tmp_path / "b.txt").write_text("another corpus, so that something is prepared")
    prepare_here(tmp_path / "b.txt", tmp_path)
    assert not left.exists()
