"""Rows with labels, encoded once into a folder that every process maps into memory.

What a row becomes follows from the objective. Classified as a whole: one text, or a pair, and one label. Classified word by
word: a list of words and as many labels; a word's first token has its label, its other tokens have none.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path
from typing import NamedTuple, cast

from mpsdk.backend import IGNORED_LABEL
from mpsdk.data import faults as fault
from mpsdk.data.cache import changed, dtype_of, key_of, write_once
from mpsdk.data.dataset import Part
from mpsdk.data.encoding import Encoded, RowEncoder
from mpsdk.data.faults import Fault, Faults
from mpsdk.data.labels import Labels
from mpsdk.data.rows import FORMAT, VERSION, EncodedRow, LabelledRows, RowsHeader, RowWriter
from mpsdk.data.tables import Row, Table, open_table, text_in
from mpsdk.data.tokenizer import Tokenizer
from mpsdk.errors import DataError

log = logging.getLogger(__name__)

BATCH = 1000  # rows encoded at once


@dataclass(frozen=True)
class Labelling:
    """Which columns have a row's texts and its label, and what the label may be.

    `words`: the text is a list of words, and the label a list of one for each.
    """

    labels: Labels
    words: bool = False
    text_column: str = "text"
    pair_column: str | None = None
    label_column: str = "label"

    @property
    def text_columns(self) -> tuple[str, ...]:
        return (self.text_column, *([] if self.pair_column is None else [self.pair_column]))


class _Example(NamedTuple):
    """A row of which every value is right: its one or two texts or its words, and its label or its words' labels."""

    texts: tuple[str, ...]
    labels: tuple[int, ...]
    row: Row


def prepare_labelled(
    source: object,
    *,
    labelling: Labelling,
    tokenizer: Tokenizer,
    sequence_length: int,
    cache_directory: str | Path,
    part: Part = "train",
    validation_fraction: float = 0.0,
) -> LabelledRows:
    """Encode the rows of `source`, unless that was done before, and open them.

    Args:
        source: what `mpsdk.data.tables` lists.
        sequence_length: tokens of a row, special tokens included. Longer texts are cut, shorter ones filled up.
        part: with a `validation_fraction`, which part to open.
        validation_fraction: the share of the rows that is held out of training; see `mpsdk.data.rows`.

    Raises DataError with every bad file, column and row when the data can't be used.
    """
    encoder = tokenizer.rows(sequence_length)
    shortest = encoder.shortest(len(labelling.text_columns))
    if sequence_length < shortest:
        raise DataError(
            f"a row has at least {shortest} tokens, special ones included; training.sequence_length is {sequence_length}"
        )
    table = open_table(source, (*labelling.text_columns, labelling.label_column))
    content, specials = table.digest(), tokenizer.specials
    encoding = [tokenizer.fingerprint, repr(specials), sequence_length, repr(labelling)]
    key = key_of([FORMAT, VERSION, content, *encoding])
    directory = Path(cache_directory) / key

    def fill(folder: Path) -> str:
        header = RowsHeader(
            rows=0,
            sequence_length=sequence_length,
            dtype=dtype_of(tokenizer),
            pads_left=specials.pads_left,
            labels_tokens=labelling.words,
            content=key,
        )
        with RowWriter(folder, header, specials.pad) as writer:
            _write_rows(table, labelling, encoder, writer)
        if table.digest() != content:
            raise changed(table.name)
        return writer.header.to_json()

    if not directory.exists():
        write_once(directory, table.name, fill)
    return LabelledRows.open(directory, part=part, validation_fraction=validation_fraction, name=table.name)


def _write_rows(table: Table, labelling: Labelling, encoder: RowEncoder, writer: RowWriter) -> None:
    """All rows of `table`. Raises DataError with all that is wrong with them."""
    faults = Faults(table.name)
    cut = lost = 0
    for batch in _batches(_examples(table, labelling, faults)):
        if faults:
            continue  # only read on, to find what else is wrong
        texts = [example.texts for example in batch]
        encoded = encoder.words(texts) if labelling.words else encoder.texts(texts)
        rows: list[EncodedRow] = []
        for example, found in zip(batch, encoded, strict=True):
            labels = _labels_of_tokens(found, example.labels) if labelling.words else example.labels[0]
            if not found.ids or (isinstance(labels, list) and set(labels) <= {IGNORED_LABEL}):
                faults.add(example.row.place, fault.NO_TOKENS, example.row.number, unit=example.row.unit)
            rows.append(EncodedRow(found.ids, found.types, labels))
            cut += found.cut
            lost += labelling.words and not found.cut and len({*found.words} - {-1}) < len(example.texts)
        writer.add(rows)
    faults.raise_if_any()
    if cut:
        log.warning("%s: %d of %d rows were cut to sequence_length", table.name, cut, writer.header.rows)
    if lost:
        message = "%s: in %d of %d rows the tokenizer makes no token of some word, whose label is lost"
        log.warning(message, table.name, lost, writer.header.rows)


def _labels_of_tokens(found: Encoded, labels: Sequence[int]) -> list[int]:
    """The label of a word at its first token, and none at the others."""
    return [
        labels[word] if word not in (-1, before) else IGNORED_LABEL
        for before, word in pairwise([-1, *found.words])
    ]


# --- what is in a row ---------------------------------------------------------------------------------------------


def _examples(table: Table, labelling: Labelling, faults: Faults) -> Iterator[_Example]:
    """The rows without a fault; what is wrong with the others is noted."""
    for row in table.rows(faults):
        texts = _words(row.values[0]) if labelling.words else _texts(row.values[:-1])
        labels = _labels(row.values[-1], labelling)
        wrong = [found for found in (texts, labels) if isinstance(found, Fault)]
        for what in wrong:
            faults.add(row.place, what, row.number, unit=row.unit)
        if isinstance(texts, Fault) or isinstance(labels, Fault):
            continue
        if labelling.words and len(texts) != len(labels):
            faults.add(row.place, fault.UNEVEN_LABELS, row.number, unit=row.unit)
        else:
            yield _Example(texts, labels, row)


def _texts(values: Sequence[object]) -> tuple[str, ...] | Fault:
    found: list[str] = []
    for value in values:
        text = text_in(value)
        if isinstance(text, Fault):
            return text
        found.append(text)
    return tuple(found)


def _words(value: object) -> tuple[str, ...] | Fault:
    words = _listed(value)
    if words is None:
        return fault.NO_TEXT if value is None else fault.NOT_WORDS
    return _texts(words) if words else fault.EMPTY


def _labels(value: object, labelling: Labelling) -> tuple[int, ...] | Fault:
    """The label of a row, or the labels of its words."""
    values = _listed(value) if labelling.words else [value]
    if values is None:
        return fault.NO_LABEL if value in (None, "") else fault.NOT_LABELS
    found: list[int] = []
    for single in values:
        number = labelling.labels.number(single)
        if isinstance(number, Fault):
            return number
        found.append(number)
    return tuple(found)


def _listed(value: object) -> list[object] | None:
    """A list, or text that is one in JSON: a cell of CSV can hold nothing else."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            return None
    return [*cast("Sequence[object]", value)] if isinstance(value, (list, tuple)) else None


def _batches(examples: Iterator[_Example]) -> Iterator[list[_Example]]:
    while batch := list(islice(examples, BATCH)):
        yield batch
