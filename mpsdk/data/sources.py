"""What training data can come from, each read as a stream of documents in pieces of bounded size.

| source | documents |
|---|---|
| a .txt file | one |
| a .jsonl file | one a line, its field "text"; blank lines don't count |
| a directory | those of all .txt and .jsonl files in it and below, by path |
| a Hugging Face dataset | one a row, its column "text" |
| a list of lists (or of arrays) of token ids, a two-dimensional array | one a row |
| a list or one-dimensional array of token ids | taken as it is: it says itself where documents end |
"""

from __future__ import annotations

import codecs
import hashlib
import json
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from mpsdk.data import faults as fault
from mpsdk.data.faults import Faults
from mpsdk.data.pieces import PIECE, Piece, cut
from mpsdk.errors import DataError

log = logging.getLogger(__name__)

BLOCK = 1 << 20  # bytes read at once
ROWS = 1000  # rows of a Hugging Face dataset read at once
ACCEPTED = "a .txt or .jsonl file, a directory of them, a Hugging Face dataset, or token ids (a list or an integer array)"
NOTES = ("README", "LICENSE", "NOTICE")  # may lie beside a corpus without a warning
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


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


def open_source(source: object, *, vocab_size: int, text_field: str = "text") -> Source:
    """The Source for anything that `fit` takes as data; token ids in it must be below `vocab_size`.

    Raises DataError for what it doesn't know or can't find.
    """
    if isinstance(source, (str, os.PathLike)):
        path = Path(cast("str", source))
        return TextFiles(_files(path), str(path), text_field)
    if isinstance(source, dict):
        keys = ", ".join(map(repr, cast("dict[object, object]", source)))
        raise DataError(f"this is a dict of data sets ({keys}), not one: pass one of its values")
    if isinstance(source, (np.ndarray, list, tuple)):
        return TokenIds.of(cast("NDArray[Any] | Sequence[Any]", source), vocab_size)
    if hasattr(source, "select_columns") and hasattr(source, "iter"):
        return TextColumn.of(cast("HuggingFaceDataset", source), text_field)
    raise DataError(f"training data can't be a {type(source).__name__}; pass {ACCEPTED}")


# --- files --------------------------------------------------------------------------------------------------------


def _files(path: Path) -> tuple[Path, ...]:
    if path.is_dir():
        found = sorted(
            (
                Path(folder, name)
                for folder, _, names in os.walk(path)
                for name in names
                if not name.startswith(".")
            ),
            key=lambda file: file.relative_to(path).as_posix(),
        )
        files = tuple(file for file in found if file.suffix.lower() in READERS)
        if not files:
            raise DataError(f"{path} has no .txt or .jsonl file in it or below")
        others = [str(file.relative_to(path)) for file in found if file.suffix.lower() not in READERS]
        if left_out := [name for name in others if not Path(name).name.startswith(NOTES)]:
            log.warning("%s: not read, neither .txt nor .jsonl: %s", path, ", ".join(left_out))
        return files
    if not path.exists():
        raise DataError(f"{path} does not exist; pass {ACCEPTED}")
    if path.suffix.lower() not in READERS:
        raise DataError(f"{path} ends neither in .txt nor in .jsonl; pass {ACCEPTED}")
    return (path,)


@dataclass(frozen=True)
class TextFiles:
    """Files of text, read in the order given."""

    files: tuple[Path, ...]
    name: str
    text_field: str

    def digest(self) -> str:
        faults = Faults(self.name)
        contents: list[tuple[str, str | None, str]] = []
        for file in self.files:
            suffix = file.suffix.lower()
            try:
                with file.open("rb") as stream:
                    content = hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=32)).hexdigest()
            except OSError:
                faults.add(str(file), fault.UNREADABLE)
                continue
            contents.append((suffix, self.text_field if suffix == ".jsonl" else None, content))
        faults.raise_if_any()
        return hashlib.blake2b(json.dumps(contents).encode(), digest_size=16).hexdigest()

    def pieces(self, faults: Faults) -> Iterator[Piece]:
        for file in self.files:
            try:
                yield from READERS[file.suffix.lower()](file, self.text_field, faults)
            except OSError:
                faults.add(str(file), fault.UNREADABLE)


def _read_text(file: Path, _: str, faults: Faults) -> Iterator[Piece]:
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    with file.open("rb") as stream:
        blocks = chain(iter(lambda: stream.read(BLOCK), b""), [b""])
        empty = True
        try:
            for piece in cut(decoder.decode(block, final=not block) for block in blocks):
                empty = False
                yield piece
        except UnicodeDecodeError:
            stream.seek(0)
            for number, line in enumerate(stream, start=1):
                if _decoded(line) is None:
                    faults.add(str(file), fault.NOT_UTF8, number)
            return
    if empty:
        faults.add(str(file), fault.EMPTY)


def _read_json_lines(file: Path, text_field: str, faults: Faults) -> Iterator[Piece]:
    count = 0
    with file.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            if number == 1:
                line = line.removeprefix(BYTE_ORDER_MARK)
            if not line.strip():
                continue
            count += 1
            text = _text_of(line, text_field)
            if isinstance(text, fault.Fault):
                faults.add(str(file), text, number)
            else:
                yield from cut([text])
    if not count:
        faults.add(str(file), fault.EMPTY)


def _text_of(line: bytes, text_field: str) -> str | fault.Fault:
    """The text in one line of a .jsonl file, or what is wrong with it."""
    decoded = _decoded(line)
    if decoded is None:
        return fault.NOT_UTF8
    try:
        record = json.loads(decoded)
    except (ValueError, RecursionError):
        return fault.NOT_JSON
    if not isinstance(record, dict):
        return fault.NOT_OBJECT
    return _checked(cast("dict[str, object]", record).get(text_field))


def _checked(text: object) -> str | fault.Fault:
    if text is None:
        return fault.NO_FIELD
    if not isinstance(text, str):
        return fault.NOT_TEXT
    try:
        text.encode()
    except UnicodeEncodeError:
        return fault.SURROGATE
    return text or fault.EMPTY


def _decoded(line: bytes) -> str | None:
    try:
        return line.decode()
    except UnicodeDecodeError:
        return None


READERS = {".txt": _read_text, ".jsonl": _read_json_lines}


# --- Hugging Face datasets ----------------------------------------------------------------------------------------


class HuggingFaceDataset(Protocol):
    """What is used of `datasets.Dataset` and `datasets.IterableDataset`."""

    @property
    def column_names(self) -> list[str] | None: ...

    def select_columns(self, column_names: str) -> HuggingFaceDataset: ...

    def iter(self, batch_size: int) -> Iterator[dict[str, Sequence[object]]]: ...


@dataclass(frozen=True)
class TextColumn:
    """A column of texts."""

    dataset: HuggingFaceDataset
    text_field: str
    name: str = "the Hugging Face dataset"

    @classmethod
    def of(cls, dataset: HuggingFaceDataset, text_field: str) -> TextColumn:
        columns = dataset.column_names
        if columns is not None and text_field not in columns:
            raise DataError(
                f"the Hugging Face dataset has no column {text_field!r}, but {columns}; name its text column "
                "with text_field, or rename it: dataset.rename_column(..., 'text')"
            )
        return cls(dataset.select_columns(text_field), text_field)

    def _texts(self) -> Iterator[object]:
        for batch in self.dataset.iter(ROWS):
            yield from batch[self.text_field]

    def digest(self) -> str:
        whole = hashlib.blake2b(b"text column", digest_size=16)
        for text in self._texts():
            content = text.encode(errors="surrogatepass") if isinstance(text, str) else repr(text).encode()
            whole.update(len(content).to_bytes(8, "little") + content)
        return whole.hexdigest()

    def pieces(self, faults: Faults) -> Iterator[Piece]:
        count = 0
        for count, value in enumerate(self._texts(), start=1):
            text = _checked(value)
            if isinstance(text, fault.Fault):
                faults.add(self.name, text, count - 1, unit="row")
            else:
                yield from cut([text])
        if not count:
            faults.add(self.name, fault.EMPTY)


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
