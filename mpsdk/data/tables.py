"""Rows with named columns, each read as a stream.

| table | a row |
|---|---|
| a .jsonl file | a line's JSON object; blank lines don't count |
| a .csv file | a record (RFC 4180), under the names in the first; every value is text |
| a .parquet file | a row; reading it needs pyarrow |
| a directory | those of all such files in it and below, by path |
| a Hugging Face dataset | a row |
| a list of dicts | a dict |
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol, cast

from mpsdk.data import faults as fault
from mpsdk.data.faults import Fault, Faults
from mpsdk.data.files import decoded, digest_of_files, find_files, note_not_utf8
from mpsdk.errors import DataError

SUFFIXES = (".jsonl", ".csv", ".parquet")
ACCEPTED = "a .jsonl, .csv or .parquet file, a directory of them, a Hugging Face dataset, or a list of dicts"
ROWS = 1000  # rows of a dataset or a Parquet file read at once
LARGEST_CELL = 1 << 30  # characters; Python's csv takes no more than 131,072 unless told
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class Row(NamedTuple):
    """The values of the columns that were asked for, in that order, and where they stand."""

    values: tuple[object, ...]
    place: str
    number: int
    unit: str = "row"


class Table(Protocol):
    """Rows in a fixed order."""

    @property
    def name(self) -> str: ...

    def digest(self) -> str:
        """Names the content of the columns: equal contents, equal digests."""
        ...

    def rows(self, faults: Faults) -> Iterator[Row]:
        """Every row. What is wrong is noted in `faults`, left out, and the reading goes on."""
        ...


def open_table(source: object, columns: tuple[str, ...]) -> Table:
    """The table for anything that `fit` takes as labelled data. Raises DataError for what it doesn't know or can't find."""
    if isinstance(source, (str, os.PathLike)):
        path = Path(cast("str", source))
        return TableFiles(find_files(path, SUFFIXES, accepted=ACCEPTED), str(path), columns)
    if isinstance(source, Mapping):
        keys = ", ".join(map(repr, cast("Mapping[object, object]", source)))
        raise DataError(f"this is a dict of data sets ({keys}), not one: pass one of its values")
    if is_list_of_dicts(source):
        return ListOfDicts(cast("Sequence[Mapping[str, object]]", source), columns)
    if is_dataset(source):
        return DatasetColumns.of(cast("HuggingFaceDataset", source), columns)
    raise DataError(f"data with labels can't be a {type(source).__name__}; pass {ACCEPTED}")


# --- files --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TableFiles:
    """Files of rows, read in the order given."""

    files: tuple[Path, ...]
    name: str
    columns: tuple[str, ...]

    def digest(self) -> str:
        return digest_of_files(self.files, self.name, self.columns)

    def rows(self, faults: Faults) -> Iterator[Row]:
        for file in self.files:
            yield from read_rows(file, self.columns, faults)


def read_rows(file: Path, columns: tuple[str, ...], faults: Faults) -> Iterator[Row]:
    """The rows of one file. Raises DataError when it takes pyarrow to read it, and that is not there."""
    readers = {".jsonl": _json_lines, ".csv": _csv, ".parquet": _parquet}
    try:
        yield from readers[file.suffix.lower()](file, columns, faults)
    except OSError:
        faults.add(str(file), fault.UNREADABLE)


def _json_lines(file: Path, columns: tuple[str, ...], faults: Faults) -> Iterator[Row]:
    place, count = str(file), 0
    with file.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            if number == 1:
                line = line.removeprefix(BYTE_ORDER_MARK)
            if not line.strip():
                continue
            count += 1
            values = _values_in(line, columns)
            if isinstance(values, Fault):
                faults.add(place, values, number)
            else:
                yield Row(values, place, number, "line")
    if not count:
        faults.add(place, fault.EMPTY)


def _values_in(line: bytes, columns: tuple[str, ...]) -> tuple[object, ...] | Fault:
    """The values in one line of a .jsonl file, or what is wrong with it."""
    text = decoded(line)
    if text is None:
        return fault.NOT_UTF8
    try:
        record = json.loads(text)
    except (ValueError, RecursionError):
        return fault.NOT_JSON
    if not isinstance(record, dict):
        return fault.NOT_OBJECT
    return _picked(cast("dict[str, object]", record), columns)


def _picked(record: Mapping[str, object], columns: tuple[str, ...]) -> tuple[object, ...] | Fault:
    return _lacking(columns, record) or tuple(record[name] for name in columns)


def _lacking(columns: Sequence[str], there: Iterable[str]) -> Fault | None:
    names = list(there)
    lacking = [name for name in columns if name not in names]
    return fault.missing(lacking, names) if lacking else None


def _csv(file: Path, columns: tuple[str, ...], faults: Faults) -> Iterator[Row]:
    csv.field_size_limit(LARGEST_CELL)
    place, following = str(file), 1
    with file.open(encoding="utf-8-sig", newline="") as stream:
        reader = csv.reader(stream, strict=True)
        try:
            header = next(reader, list[str]())
            if header and (lacking := _lacking(columns, header)):
                faults.add(place, lacking)
                return
            picked = [header.index(name) for name in columns] if header else []
            following, count = reader.line_num + 1, 0
            for cells in reader:
                number, following = following, reader.line_num + 1
                if not cells:
                    continue
                count += 1
                if len(cells) != len(header):
                    faults.add(place, fault.UNEVEN, number)
                else:
                    yield Row(tuple(cells[index] for index in picked), place, number, "line")
        except UnicodeDecodeError:
            note_not_utf8(file, faults)
        except csv.Error:
            faults.add(place, fault.NOT_CSV, following)
        else:
            if not count:
                faults.add(place, fault.EMPTY)


def _parquet(file: Path, columns: tuple[str, ...], faults: Faults) -> Iterator[Row]:
    try:
        import pyarrow  # pyright: ignore
        import pyarrow.parquet  # pyright: ignore
    except ImportError as error:
        raise DataError(f"reading {file} needs pyarrow: pip install 'mpsdk[hf]'") from error
    arrow, place, number = cast("Any", pyarrow), str(file), 0
    with file.open("rb") as stream:
        try:
            content = arrow.parquet.ParquetFile(stream)
            if lacking := _lacking(columns, content.schema_arrow.names):
                faults.add(place, lacking)
                return
            for batch in content.iter_batches(batch_size=ROWS, columns=list(columns)):
                found = [batch.column(name).to_pylist() for name in columns]
                for values in zip(*found, strict=True):
                    yield Row(values, place, number)
                    number += 1
        except (arrow.ArrowException, OSError):
            faults.add(place, fault.NOT_PARQUET)
            return
    if not number:
        faults.add(place, fault.EMPTY)


# --- in memory ----------------------------------------------------------------------------------------------------


def is_list_of_dicts(source: object) -> bool:
    rows = cast("Sequence[object]", source) if isinstance(source, (list, tuple)) else ()
    return len(rows) > 0 and all(isinstance(row, Mapping) for row in rows)


@dataclass(frozen=True)
class ListOfDicts:
    """Rows that the caller holds."""

    records: Sequence[Mapping[str, object]]
    columns: tuple[str, ...]
    name: str = "the list of rows"

    def digest(self) -> str:
        return _digest_of_rows(self.rows(Faults(self.name)), self.columns)

    def rows(self, faults: Faults) -> Iterator[Row]:
        for number, record in enumerate(self.records):
            values = _picked(record, self.columns)
            if isinstance(values, Fault):
                faults.add(self.name, values, number, unit="row")
            else:
                yield Row(values, self.name, number)


class HuggingFaceDataset(Protocol):
    """What is used of `datasets.Dataset` and `datasets.IterableDataset`."""

    @property
    def column_names(self) -> list[str] | None: ...

    def select_columns(self, column_names: list[str]) -> HuggingFaceDataset: ...

    def with_format(self, type: None) -> HuggingFaceDataset: ...

    def iter(self, batch_size: int) -> Iterator[dict[str, Sequence[object]]]: ...


def is_dataset(source: object) -> bool:
    return hasattr(source, "select_columns") and hasattr(source, "iter")


@dataclass(frozen=True)
class DatasetColumns:
    """Some columns of a Hugging Face dataset. A streamed one is read from its beginning each time."""

    dataset: HuggingFaceDataset
    columns: tuple[str, ...]
    name: str = "the Hugging Face dataset"

    @classmethod
    def of(cls, dataset: HuggingFaceDataset, columns: tuple[str, ...]) -> DatasetColumns:
        """Raises DataError when it has no such columns."""
        there = dataset.column_names  # None: a stream that only its rows could tell
        if there is not None and (lacking := _lacking(columns, there)):
            faults = Faults(cls.name)
            faults.add(cls.name, lacking)
            faults.raise_if_any()
        return cls(dataset.select_columns(list(columns)).with_format(None), columns)

    def digest(self) -> str:
        return _digest_of_rows(self.rows(Faults(self.name)), self.columns)

    def rows(self, faults: Faults) -> Iterator[Row]:
        number = 0
        for batch in self.dataset.iter(ROWS):
            for values in zip(*(batch[name] for name in self.columns), strict=True):
                yield Row(values, self.name, number)
                number += 1
        if not number:
            faults.add(self.name, fault.EMPTY)


def _digest_of_rows(rows: Iterator[Row], columns: tuple[str, ...]) -> str:
    whole = hashlib.blake2b(json.dumps(columns).encode(), digest_size=16)
    for row in rows:
        content = json.dumps(row.values, default=repr).encode()
        whole.update(len(content).to_bytes(8, "little") + content)
    return whole.hexdigest()


# --- values -------------------------------------------------------------------------------------------------------


def text_in(value: object) -> str | Fault:
    """`value` as text that can be tokenised, or why it can't."""
    if value is None:
        return fault.NO_TEXT
    if not isinstance(value, str):
        return fault.NOT_TEXT
    try:
        value.encode()
    except UnicodeEncodeError:
        return fault.SURROGATE
    return value or fault.EMPTY
