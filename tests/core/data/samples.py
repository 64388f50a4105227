"""Small datasets for the tests of this folder."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mpsdk.data import BytesTokenizer, Dataset
from mpsdk.data.dataset import Header

SHAKESPEARE = Path(__file__).parents[3] / "examples" / "data" / "shakespeare"


def dataset_of_samples(samples: int, sequence_length: int = 1) -> Dataset:
    """A dataset in memory whose token i is i, so that a row's first id says which sample it is."""
    ids = np.arange(samples * sequence_length + 1, dtype=np.uint32)
    header = Header("<u4", ids.size, ids.size, 0, f"{samples} samples", "none")
    return Dataset(Path("memory"), header, ids, sequence_length, first=0, length=samples)


def tokens_of(*documents: str) -> list[int]:
    """What the bytes tokenizer is to make of these documents, said independently of the code under test."""
    return [token for text in documents for token in [*text.encode("utf-8"), 256]]


class Counting(BytesTokenizer):
    """A bytes tokenizer that counts how often it is asked."""

    def __init__(self) -> None:
        self.calls = 0

    def encode_many(self, texts):
        self.calls += 1
        return super().encode_many(texts)
