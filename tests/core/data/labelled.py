"""Small tables with labels for the tests of this folder, in every form that a table may have."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from mpsdk.data import BytesTokenizer, LabelledRows, Labelling, Labels, prepare_labelled

Rows = Sequence[Mapping[str, Any]]

REVIEWS: Rows = [
    {"text": "a fine film", "label": "good", "id": 1},
    {"text": 'dull, "long"\nand loud', "label": "bad", "id": 2},
    {"text": "naïve — but kind", "label": "good", "id": 3},
    {"text": "x", "label": "bad", "id": 4},
]
PAIRS: Rows = [
    {"premise": "it rains", "hypothesis": "it is wet", "label": 1},
    {"premise": "she sings a long song", "hypothesis": "no", "label": 0},
]
TAGGED: Rows = [
    {"tokens": ["Ada", "lives", "in", "Bath"], "tags": ["PER", "O", "O", "LOC"]},
    {"tokens": ["né"], "tags": ["O"]},
]
REVIEW_LABELS = Labelling(Labels(2, ("bad", "good")))
PAIR_LABELS = Labelling(Labels(2), text_column="premise", pair_column="hypothesis")
TAG_LABELS = Labelling(Labels(3, ("O", "PER", "LOC")), words=True, text_column="tokens", label_column="tags")


def as_csv(rows: Rows, folder: Path) -> Path:
    with (folder / "rows.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        for row in rows:
            writer.writerow(
                {key: json.dumps(value) if isinstance(value, list) else value for key, value in row.items()}
            )
    return folder / "rows.csv"


def as_json_lines(rows: Rows, folder: Path) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def as_parquet(rows: Rows, folder: Path) -> Path:
    pytest.importorskip("pyarrow")
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist([dict(row) for row in rows]), folder / "rows.parquet"
    )
    return folder / "rows.parquet"


def as_dataset(rows: Rows, folder: Path) -> Any:
    return pytest.importorskip("datasets").Dataset.from_list([dict(row) for row in rows])


def as_stream(rows: Rows, folder: Path) -> Any:
    return as_dataset(rows, folder).to_iterable_dataset()


def as_list(rows: Rows, folder: Path) -> list[dict[str, Any]]:
    return [dict(row) for row in rows]


WITHOUT_LIBRARIES: list[Callable[[Rows, Path], Any]] = [as_csv, as_json_lines, as_list]
WITH_LIBRARIES: list[Callable[[Rows, Path], Any]] = [as_parquet, as_dataset, as_stream]
FORMS: list[Any] = [
    *WITHOUT_LIBRARIES,
    *(pytest.param(form, marks=pytest.mark.hf) for form in WITH_LIBRARIES),
]


def prepared(source: object, folder: Path, labelling: Labelling, **options: Any) -> LabelledRows:
    options = {"tokenizer": BytesTokenizer(), "sequence_length": 24, **options}
    return prepare_labelled(source, labelling=labelling, cache_directory=folder / "cache", **options)
