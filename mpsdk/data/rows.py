"""Encoded rows with labels on disk, each filled up to one static length.

A folder has `ids.bin` and `types.bin` of shape (rows, sequence_length), the latter saying of each token which text it is of,
`lengths.bin` (rows,), how many of a row's tokens are not padding, and `labels.bin`, of rows or of tokens.

Held out for validation are rows that a permutation chooses, keyed by the content: files are often sorted by label, so that
their end would hold one class alone. The choice is the same in every run, whatever its seed.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from mpsdk.backend import IGNORED_LABEL
from mpsdk.data.dataset import Part, check_indices, kept_of, mapped, read_header
from mpsdk.data.permutation import Permutation

FORMAT = "mpsdk-rows"
VERSION = 1
_PURPOSE = "mpsdk validation rows 1"


@dataclass(frozen=True)
class RowsHeader:
    """What `dataset.json` says of the arrays beside it."""

    rows: int
    sequence_length: int
    dtype: Literal["<u2", "<u4"]  # of the ids
    pads_left: bool
    labels_tokens: bool  # or rows
    content: str  # digest of what was encoded, and how

    def to_json(self) -> str:
        return json.dumps({"format": FORMAT, "version": VERSION, **self.__dict__}, indent=2) + "\n"

    def arrays(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Type and shape of each array."""
        rows = (self.rows,)
        tokens = (self.rows, self.sequence_length)
        return {
            "ids": (self.dtype, tokens),
            "types": ("u1", tokens),
            "lengths": ("<u4", rows),
            "labels": ("<i4", tokens if self.labels_tokens else rows),
        }


class EncodedRow(NamedTuple):
    """A row before it is filled up: as many types as ids, and as many labels, or one label for all."""

    ids: Sequence[int]
    types: Sequence[int]
    labels: Sequence[int] | int


class RowWriter:
    """Writes the arrays of a folder, row after row, on leaving its context to the disk.

    Args:
        header: its `rows` are those of the data so far.
        pad: the id that rows are filled up with.
    """

    def __init__(self, folder: Path, header: RowsHeader, pad: int) -> None:
        self.header, self._pad = header, pad
        self._folder, self._files = folder, dict[str, BinaryIO]()
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        for name in self.header.arrays():
            self._files[name] = self._stack.enter_context((self._folder / f"{name}.bin").open("xb"))
        return self

    def __exit__(self, *_: object) -> None:
        with self._stack:
            for file in self._files.values():
                file.flush()
                os.fsync(file.fileno())

    def add(self, rows: Sequence[EncodedRow]) -> None:
        self.header = replace(self.header, rows=self.header.rows + len(rows))
        columns = {
            "ids": [self._filled(row.ids, self._pad) for row in rows],
            "types": [self._filled(row.types, 0) for row in rows],
            "lengths": [len(row.ids) for row in rows],
            "labels": [
                row.labels if isinstance(row.labels, int) else self._filled(row.labels, IGNORED_LABEL)
                for row in rows
            ],
        }
        for name, (dtype, _) in self.header.arrays().items():
            self._files[name].write(np.array(columns[name], dtype=dtype).tobytes())

    def _filled(self, values: Sequence[int], padding: int) -> list[int]:
        rest = [padding] * (self.header.sequence_length - len(values))
        return [*rest, *values] if self.header.pads_left else [*values, *rest]


@dataclass(frozen=True, eq=False)
class LabelledRows:
    """Rows of tokens with labels, memory-mapped. See `mpsdk.data.labelled` for what they are made of."""

    path: Path
    """The folder on disk; `LabelledRows.open(path)` opens the same rows in any process."""
    header: RowsHeader
    arrays: dict[str, NDArray[Any]]
    first: int
    length: int
    order: Permutation | None = None
    """Which row of the folder stands at which place; rows `first` to `first + length` of them are here. None: as they are."""

    @classmethod
    def open(
        cls,
        directory: str | Path,
        *,
        part: Part = "train",
        validation_fraction: float = 0.0,
        name: str | None = None,
    ) -> LabelledRows:
        """Open a folder that `prepare_labelled` made; `part` and `validation_fraction` as there. `name` is for messages.

        Raises DataError when the folder is not a whole dataset, or holding out leaves nothing.
        """
        directory = Path(directory)
        header = read_header(directory, lambda values: RowsHeader(**values), FORMAT, VERSION)
        arrays = {
            array: mapped(directory / f"{array}.bin", dtype, shape)
            for array, (dtype, shape) in header.arrays().items()
        }
        whole = cls(directory, header, arrays, first=0, length=header.rows)
        if part == "train" and validation_fraction == 0.0:
            return whole
        kept = kept_of(header.rows, validation_fraction, name=name or str(directory))
        order = Permutation(header.rows, json.dumps([_PURPOSE, header.content]).encode())
        if part == "train":
            return replace(whole, length=kept, order=order)
        return replace(whole, first=kept, length=header.rows - kept, order=order)

    def __len__(self) -> int:
        return self.length

    @property
    def sequence_length(self) -> int:
        return self.header.sequence_length

    @property
    def fingerprint(self) -> str:
        """Names the rows: content and encoding, and which of the folder's rows these are."""
        identity = [self.header.content, self.order is not None, self.first, self.length]
        return hashlib.blake2b(json.dumps(identity).encode(), digest_size=16).hexdigest()

    def rows(
        self, indices: NDArray[np.int64], epochs: NDArray[np.int64] | None = None
    ) -> dict[str, NDArray[np.int32]]:
        """`input_ids`, `attention_mask` (0 at padding) and `token_type_ids`, each int32 of shape
        (len(indices), sequence_length); `labels` like them, or of shape (len(indices),). The same in all `epochs`.

        Raises IndexError for an index outside [0, len(self)).
        """
        check_indices(indices, self.length)
        places = indices.astype(np.int64) + self.first
        stored = places if self.order is None else self.order(places)
        found = {name: array[stored].astype(np.int32) for name, array in self.arrays.items()}
        position, length = np.arange(self.sequence_length), found["lengths"][:, None]
        if self.header.pads_left:
            position = position[::-1]
        return {
            "input_ids": found["ids"],
            "attention_mask": (position < length).astype(np.int32),
            "token_type_ids": found["types"],
            "labels": found["labels"],
        }
