"""A tokenised corpus on disk, cut into samples of one static shape."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

import numpy as np
from numpy.typing import DTypeLike, NDArray

from mpsdk.errors import DataError

FORMAT = "mpsdk-tokens"
VERSION = 1
TOKENS_FILE = "tokens.bin"
HEADER_FILE = "dataset.json"

Part = Literal["train", "validation"]
Token = np.uint16 | np.uint32
T = TypeVar("T")


@dataclass(frozen=True)
class Header:
    """What `dataset.json` says of the token ids in `tokens.bin` beside it."""

    dtype: Literal["<u2", "<u4"]  # little-endian on every machine
    tokens: int
    vocab_size: int
    end_of_document: int
    content: str  # digest of what was tokenised
    tokenizer: str  # fingerprint of what tokenised it

    def to_json(self) -> str:
        return json.dumps({"format": FORMAT, "version": VERSION, **self.__dict__}, indent=2) + "\n"

    @classmethod
    def read(cls, directory: Path) -> Header:
        """Raises DataError when `directory` holds no dataset of this version."""
        return read_header(directory, lambda values: cls(**values), FORMAT, VERSION)


def read_header(directory: Path, make: Callable[[dict[str, Any]], T], form: str, version: int) -> T:
    """What `make` makes of the fields in `dataset.json`. Raises DataError unless it has those of this version of `form`."""
    try:
        values = cast("dict[str, Any]", json.loads((directory / HEADER_FILE).read_text("utf-8")))
        if (values.pop("format"), values.pop("version")) == (form, version):
            return make(values)
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
        raise DataError(
            f"{directory} is not a prepared dataset: {HEADER_FILE} is missing or unreadable"
        ) from error
    raise DataError(f"{directory} holds another version of the {form} format; delete it and prepare it again")


def mapped(file: Path, dtype: DTypeLike, shape: tuple[int, ...]) -> NDArray[Any]:
    """The array in `file`, read-only and memory-mapped. Raises DataError when the file has another size."""
    expected = math.prod(shape) * np.dtype(dtype).itemsize
    found = file.stat().st_size if file.exists() else 0
    if found != expected:
        raise DataError(
            f"{file} is damaged: it has {found} bytes and should have {expected}; delete {file.parent} and run again"
        )
    return np.memmap(file, dtype=dtype, mode="r", shape=shape)


@dataclass(frozen=True, eq=False)
class Dataset:
    """Samples of `sequence_length` + 1 consecutive tokens, sample i starting at token i * sequence_length.

    Consecutive samples share one token, the last label of one and the first input of the next, so that every token
    but the very first is a label once; fewer than `sequence_length` tokens at the end are left over. Documents follow
    each other, each ended by the tokenizer's end of document. The token ids are memory-mapped.
    """

    path: Path
    """The folder on disk; `Dataset.open(path, sequence_length)` opens the same tokens in any process."""
    header: Header
    token_ids: NDArray[Token]
    """All token ids in the file, read-only; shape (header.tokens,)."""
    sequence_length: int
    first: int
    """The sample of the file that is sample 0 here."""
    length: int

    @classmethod
    def open(
        cls,
        directory: str | Path,
        sequence_length: int,
        *,
        part: Part = "train",
        validation_fraction: float = 0.0,
        name: str | None = None,
    ) -> Dataset:
        """Open a folder that `prepare` made; `part` and `validation_fraction` as there. `name` is for messages.

        Raises DataError when the folder is not a whole dataset or is too short for one sample.
        """
        directory = Path(directory)
        name = name or str(directory)
        if sequence_length < 1:
            raise DataError(f"sequence_length must be at least 1, not {sequence_length}")
        header = Header.read(directory)
        token_ids = mapped(directory / TOKENS_FILE, header.dtype, (header.tokens,))
        samples = (header.tokens - 1) // sequence_length
        if samples < 1:
            raise DataError(
                f"{name} has {header.tokens} tokens, too few for one sample of sequence_length {sequence_length} + 1: "
                f"use a sequence_length of at most {header.tokens - 1}, or more data"
            )
        whole = cls(directory, header, token_ids, sequence_length, first=0, length=samples)
        if part == "train" and validation_fraction == 0.0:
            return whole
        train, validation = split_validation(whole, validation_fraction, name=name)
        return train if part == "train" else validation

    def __len__(self) -> int:
        return self.length

    @property
    def tokens(self) -> int:
        """How many tokens a pass over this dataset is trained on or evaluated on: one a label."""
        return self.length * self.sequence_length

    @property
    def vocab_size(self) -> int:
        return self.header.vocab_size

    @property
    def fingerprint(self) -> str:
        """Names the samples: content, tokenizer, sequence length, and which of the file's samples these are."""
        identity = [self.header.content, self.header.tokenizer, self.sequence_length, self.first, self.length]
        return hashlib.blake2b(json.dumps(identity).encode(), digest_size=16).hexdigest()

    def rows(
        self, indices: NDArray[np.int64], epochs: NDArray[np.int64] | None = None
    ) -> dict[str, NDArray[np.int32]]:
        """`input_ids` and `labels`, each int32 of shape (len(indices), sequence_length), the same in all `epochs`.

        Labels are shifted already: `labels[i, t]` is the token after `input_ids[i, t]`.
        Raises IndexError for an index outside [0, len(self)).
        """
        check_indices(indices, self.length)
        starts = (indices.astype(np.int64) + self.first) * self.sequence_length
        positions = starts[:, None] + np.arange(self.sequence_length + 1)
        window = self.token_ids[positions].astype(np.int32)
        return {
            "input_ids": np.ascontiguousarray(window[:, :-1]),
            "labels": np.ascontiguousarray(window[:, 1:]),
        }


def split_validation(
    dataset: Dataset, fraction: float, *, name: str = "the dataset"
) -> tuple[Dataset, Dataset]:
    """`dataset` as (training head, held-out tail): the last `fraction` of its samples, at least one.

    No label is in both. The cut depends on the fraction and on the number of samples alone.
    Raises DataError unless 0 < fraction < 1 and both parts get a sample.
    """
    kept = kept_of(dataset.length, fraction, name=name)
    rest = dataset.length - kept
    return replace(dataset, length=kept), replace(dataset, first=dataset.first + kept, length=rest)


def kept_of(samples: int, fraction: float, *, name: str) -> int:
    """How many of `samples` stay when `fraction` of them, at least one, is held out.

    Raises DataError unless 0 < fraction < 1 and both parts get a sample.
    """
    if not 0.0 < fraction < 1.0:
        raise DataError(
            f"validation_fraction must be between 0 and 1 to hold out samples of {name}; got {fraction}"
        )
    kept = samples - max(1, round(fraction * samples))
    if kept < 1:
        raise DataError(
            f"holding out {fraction} of the {samples} samples of {name} leaves none to train on: "
            "use a smaller validation_fraction, a shorter sequence_length, or more data"
        )
    return kept


def check_indices(indices: NDArray[np.int64], length: int) -> None:
    """Raises IndexError for an index outside [0, length)."""
    if indices.size and (int(indices.min()) < 0 or int(indices.max()) >= length):
        raise IndexError(f"sample indices must be in [0, {length}); got {indices}")


def unigram_entropy(dataset: Dataset) -> float:
    """Entropy of the distribution of the dataset's labels, in nats a token.

    The loss of the best model that ignores its input. A model that has learnt anything from context is below it.
    """
    first = dataset.first * dataset.sequence_length + 1
    last = first + dataset.tokens
    counts = np.zeros(dataset.vocab_size, dtype=np.int64)
    chunk = 1 << 22
    for start in range(first, last, chunk):
        part = dataset.token_ids[start : min(start + chunk, last)]
        counts += np.bincount(part, minlength=dataset.vocab_size)
    return math.fsum(-p * math.log(p) for p in (counts[counts > 0] / dataset.tokens).tolist())
