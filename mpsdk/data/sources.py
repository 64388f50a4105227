"""What text to learn from can come from, each read as a stream of documents in pieces of bounded size.

| source | documents |
|---|---|
| a .txt file | one |
| a table of `mpsdk.data.tables` | one a row, its column "text" |
| a directory | those of all .txt, .jsonl, .csv and .parquet files in it and below, by path |
| a list of lists (or of arrays) of token ids, a two-dimensional array | one a row |
| a list or one-dimensional array of token ids | taken as it is: it says itself where documents end |
"""

from __future__ import annotations

import codecs
import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from mpsdk.data import faults as fault
from mpsdk.data.faults import Faults
from mpsdk.data.files import digest_of_files, find_files, note_not_utf8
from mpsdk.data.pieces import PIECE, Piece, cut
from mpsdk.data.tables import (
    SUFFIXES,
    Row,
    Table,
    is_dataset,
    is_list_of_dicts,
    open_table,
    read_rows,
    text_in,
)
from mpsdk.errors import DataError

BLOCK = 1 << 20  # bytes read at once
TEXT = ".txt"
ACCEPTED = (
    "a .txt, .jsonl, .csv or .parquet file, a directory of them, a Hugging Face dataset, a list of dicts, or token ids "
    "(a list or an integer array)"
)


class Source(Protocol):
    """Documents, in a fixed order."""

    @property
    def name(self) -> str: ...

    def digest(self) -> str:
        """Names the content: equal contents, equal digests."""
        ...

    def pieces(self, faults: Faults) -> Iterator[Piece]:
        """Every document, in order. What is wrong is noted in `faults`, left out, and the reading goes on."""
        ...


def open_source(source: object, *, vocab_size: int, text_column: str = "text") -> Source:
    """The Source for anything that `fit` takes as data; token ids in it must be below `vocab_size`.

    Raises DataError for what it doesn't know or can't find.
    """
    if isinstance(source, (str, os.PathLike)):
        path = Path(cast("str", source))
        files = find_files(path, (TEXT, *SUFFIXES), accepted=ACCEPTED)
        return TextFiles(files, str(path), text_column)
    if isinstance(source, Mapping) or is_list_of_dicts(source) or is_dataset(source):
        return TextColumn(open_table(cast("object", source), (text_column,)))
    if isinstance(source, (np.ndarray, list, tuple)):
        return TokenIds.of(cast("NDArray[Any] | Sequence[Any]", source), vocab_size)
    raise DataError(f"training data can't be a {type(source).__name__}; pass {ACCEPTED}")


# --- text ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TextFiles:
    """Files of text, plain or a column of a table, read in the order given."""

    files: tuple[Path, ...]
    name: str
    text_column: str

    def digest(self) -> str:
        return digest_of_files(self.files, self.name, (self.text_column,))

    def pieces(self, faults: Faults) -> Iterator[Piece]:
        for file in self.files:
            if file.suffix.lower() != TEXT:
                yield from _texts_of(read_rows(file, (self.text_column,), faults), faults)
                continue
            try:
                yield from _read_text(file, faults)
            except OSError:
                faults.add(str(file), fault.UNREADABLE)


def _read_text(file: Path, faults: Faults) -> Iterator[Piece]:
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    with file.open("rb") as stream:
        blocks = chain(iter(lambda: stream.read(BLOCK), b""), [b""])
        empty = True
        try:
            for piece in cut(decoder.decode(block, final=not block) for block in blocks):
                empty = False
                yield piece
        except UnicodeDecodeError:
            note_not_utf8(file, faults)
            return
    if empty:
        faults.add(str(file), fault.EMPTY)


@dataclass(frozen=True)
class TextColumn:
    """The one column of a table in memory."""

    table: Table

    @property
    def name(self) -> str:
        return self.table.name

    def digest(self) -> str:
        return self.table.digest()

    def pieces(self, faults: Faults) -> Iterator[Piece]:
        yield from _texts_of(self.table.rows(faults), faults)


def _texts_of(rows: Iterable[Row], faults: Faults) -> Iterator[Piece]:
    for row in rows:
        text = text_in(row.values[0])
        if isinstance(text, fault.Fault):
            faults.add(row.place, text, row.number, unit=row.unit)
        else:
            yield from cut([text])


# --- token ids ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TokenIds:
    """Ids that the user tokenised: documents, or one stream that is taken as it is."""

    documents: Sequence[Any]
    unit: str | None  # "document", or None for a stream
    vocab_size: int
    name: str = "the token ids"

    @classmethod
    def of(cls, ids: NDArray[Any] | Sequence[Any], vocab_size: int) -> TokenIds:
        if isinstance(ids, np.ndarray):
            nested = ids.ndim > 1
        else:
            if any(isinstance(row, (str, os.PathLike)) for row in ids):
                raise DataError(
                    "a list of strings could be paths or texts; pass a directory or a .jsonl file"
                )
            nested = len(ids) > 0 and all(isinstance(row, (list, tuple, np.ndarray)) for row in ids)
        if nested:
            return cls(cast("Sequence[Any]", ids), "document", vocab_size)
        return cls([ids], None, vocab_size)

    def digest(self) -> str:
        whole = hashlib.blake2b(repr(self.unit).encode(), digest_size=16)
        for document in self.documents:
            ids = _integers(document)
            if ids is None:
                whole.update(repr(document).encode())
                continue
            whole.update(len(ids).to_bytes(8, "little"))
            for start in range(0, len(ids), PIECE):
                whole.update(ids[start : start + PIECE].astype("<i8").tobytes())
        return whole.hexdigest()

    def pieces(self, faults: Faults) -> Iterator[Piece]:
        foreign = fault.Fault(f"token ids outside [0, {self.vocab_size})", fault.FOREIGN_REMEDY)
        for number, document in enumerate(self.documents):
            ids = _integers(document)
            if ids is None or not len(ids):
                self._note(faults, fault.NOT_TOKENS if ids is None else fault.EMPTY, number)
                continue
            for start in range(0, len(ids), PIECE):
                piece = ids[start : start + PIECE]
                if piece.min() < 0 or piece.max() >= self.vocab_size:
                    self._note(faults, foreign, number)
                    break
                yield Piece(piece, ends_document=self.unit is not None and start + PIECE >= len(ids))

    def _note(self, faults: Faults, what: fault.Fault, number: int) -> None:
        if self.unit is None:
            faults.add(self.name, what)
        else:
            faults.add(self.name, what, number, unit=self.unit)


def _integers(document: Any) -> NDArray[Any] | None:
    """`document` as a one-dimensional integer array, or None when it isn't one. A memory map stays one."""
    try:
        ids = np.asarray(document)
    except (ValueError, OverflowError):
        return None
    if ids.ndim == 1 and ids.size == 0:
        return ids.astype(np.int64)
    return ids if ids.ndim == 1 and ids.dtype.kind in "iu" else None
