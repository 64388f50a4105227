"""Rows with labels: the same arrays from every kind of table, and everything that is wrong with them at once."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpsdk.backend import IGNORED_LABEL
from mpsdk.data import BytesTokenizer, LabelledRows, Labelling, Labels
from mpsdk.data.encoding import Specials
from mpsdk.errors import DataError
from tests.core.data.labelled import (
    FORMS,
    PAIR_LABELS,
    PAIRS,
    REVIEW_LABELS,
    REVIEWS,
    TAG_LABELS,
    TAGGED,
    as_csv,
    as_json_lines,
    as_parquet,
    prepared,
)

PAD, END = 254, 256


def all_rows(dataset: LabelledRows) -> dict[str, list]:
    return {name: array.tolist() for name, array in dataset.rows(np.arange(len(dataset))).items()}


def filled(ids: list[int], value: int, length: int = 24) -> list[int]:
    return [*ids, *[value] * (length - len(ids))]


# -- what a row becomes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_one_text_and_its_label_are_the_same_arrays_from_every_kind_of_table(form, tmp_path):
    rows = all_rows(prepared(form(REVIEWS, tmp_path), tmp_path, REVIEW_LABELS))
    texts = [[*review["text"].encode()[:23], END] for review in REVIEWS]
    assert rows == {
        "input_ids": [filled(text, PAD) for text in texts],
        "attention_mask": [filled([1] * len(text), 0) for text in texts],
        "token_type_ids": [[0] * 24] * 4,
        "labels": [1, 0, 1, 0],
    }


@pytest.mark.parametrize("form", FORMS)
def test_a_pair_is_read_one_after_the_other_and_the_longer_is_cut_first(form, tmp_path):
    rows = all_rows(prepared(form(PAIRS, tmp_path), tmp_path, PAIR_LABELS))
    first = [*b"it rains", END, *b"it is wet", END]
    second = [*b"she sings a long son", END, *b"no", END]
    assert rows["input_ids"] == [filled(first, PAD), second]
    assert rows["token_type_ids"] == [filled([0] * 9 + [1] * 10, 0), [0] * 21 + [1] * 3]
    assert rows["attention_mask"] == [filled([1] * 19, 0), [1] * 24]
    assert rows["labels"] == [1, 0]


@pytest.mark.parametrize("form", FORMS)
def test_a_word_has_its_label_at_its_first_token(form, tmp_path):
    rows = all_rows(prepared(form(TAGGED, tmp_path), tmp_path, TAG_LABELS))
    text = [*b"Ada lives in Bath", END]
    labels = [IGNORED_LABEL] * 24
    labels[0], labels[4], labels[10], labels[13] = 1, 0, 0, 2
    assert rows["input_ids"] == [filled(text, PAD), filled([*"né".encode(), END], PAD)]
    assert rows["labels"] == [labels, filled([0], IGNORED_LABEL)]


def test_arrays_are_int32_and_a_row_can_be_read_alone(tmp_path):
    dataset = prepared(REVIEWS, tmp_path, REVIEW_LABELS)
    rows = dataset.rows(np.array([2, 0]))
    assert {array.dtype for array in rows.values()} == {np.dtype(np.int32)}
    assert {name: array.shape for name, array in rows.items()} == {
        "input_ids": (2, 24),
        "attention_mask": (2, 24),
        "token_type_ids": (2, 24),
        "labels": (2,),
    }
    everything = all_rows(dataset)
    assert rows["input_ids"].tolist() == [everything["input_ids"][i] for i in (2, 0)]
    with pytest.raises(IndexError, match=r"\[0, 4\)"):
        dataset.rows(np.array([4]))


def test_rows_are_filled_up_and_cut_at_the_side_that_the_tokenizer_says(tmp_path):
    class Left(BytesTokenizer):
        specials = Specials(pad=7, pads_left=True)

    rows = all_rows(prepared(REVIEWS[3:], tmp_path, REVIEW_LABELS, tokenizer=Left(), sequence_length=4))
    assert rows["input_ids"] == [[7, 7, ord("x"), END]]
    assert rows["attention_mask"] == [[0, 0, 1, 1]]
    tagged = prepared(TAGGED[1:], tmp_path, TAG_LABELS, tokenizer=Left(), sequence_length=5)
    assert all_rows(tagged)["labels"] == [[IGNORED_LABEL, 0, IGNORED_LABEL, IGNORED_LABEL, IGNORED_LABEL]]


def test_a_directory_is_read_file_by_file_in_the_order_of_its_paths(tmp_path):
    folder = tmp_path / "rows"
    folder.mkdir()
    as_csv(REVIEWS[:2], folder)
    as_json_lines(REVIEWS[2:], folder)
    assert all_rows(prepared(folder, tmp_path, REVIEW_LABELS)) == all_rows(
        prepared(REVIEWS, tmp_path, REVIEW_LABELS)
    )


def test_how_many_rows_were_cut_is_said(tmp_path, caplog):
    prepared(REVIEWS, tmp_path, REVIEW_LABELS, sequence_length=12)
    assert "2 of 4 rows were cut to sequence_length" in caplog.text


# -- on disk -------------------------------------------------------------------------------------------------------


def test_the_second_time_nothing_is_encoded_and_another_process_opens_the_same(tmp_path):
    first = prepared(REVIEWS, tmp_path, REVIEW_LABELS)
    assert prepared(REVIEWS, tmp_path, REVIEW_LABELS).path == first.path
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [first.path.name]
    script = (
        "import sys, numpy; from mpsdk.data import LabelledRows; rows = LabelledRows.open(sys.argv[1]); "
        "print(rows.fingerprint, rows.rows(numpy.arange(4))['input_ids'].sum())"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(first.path)], capture_output=True, text=True, check=True
    )
    total = sum(map(sum, all_rows(first)["input_ids"]))
    assert done.stdout.split() == [first.fingerprint, str(total)]


def test_whatever_changes_a_row_changes_the_folder_and_the_fingerprint(tmp_path):
    other = Labelling(Labels(2, ("good", "bad")))
    found = [
        prepared(REVIEWS, tmp_path, REVIEW_LABELS),
        prepared(REVIEWS, tmp_path, REVIEW_LABELS, sequence_length=23),
        prepared(REVIEWS, tmp_path, other),
        prepared(REVIEWS[:3], tmp_path, REVIEW_LABELS),
    ]
    assert len({rows.path for rows in found}) == len({rows.fingerprint for rows in found}) == 4


def test_a_damaged_folder_is_refused(tmp_path):
    path = prepared(REVIEWS, tmp_path, REVIEW_LABELS).path
    (path / "labels.bin").write_bytes(b"1234")
    with pytest.raises(DataError, match=r"labels\.bin is damaged: it has 4 bytes and should have 16"):
        LabelledRows.open(path)
    (path / "dataset.json").write_text("{}")
    with pytest.raises(DataError, match="not a prepared dataset"):
        LabelledRows.open(path)


@settings(deadline=None, max_examples=30)
@given(st.integers(2, 400), st.floats(0.01, 0.99))
def test_rows_held_out_are_a_share_of_them_chosen_from_everywhere(tmp_path_factory, count, fraction):
    folder = tmp_path_factory.mktemp("rows")
    source = [{"text": f"{number}", "label": int(number >= count // 2)} for number in range(count)]
    labelling = Labelling(Labels(2))
    try:
        train = prepared(source, folder, labelling, validation_fraction=fraction)
    except DataError:
        assert count - max(1, round(fraction * count)) < 1
        return
    validation = prepared(source, folder, labelling, part="validation", validation_fraction=fraction)
    assert len(validation) == max(1, round(fraction * count))
    assert train.path == validation.path and train.fingerprint != validation.fingerprint
    texts = [tuple(row) for part in (train, validation) for row in all_rows(part)["input_ids"]]
    assert len(texts) == len(set(texts)) == count
    if count > 100 and 0.2 < fraction < 0.8:  # the file is sorted by label, and both labels are held out
        assert set(all_rows(validation)["labels"]) == {0, 1}


# -- everything that is wrong, at once -----------------------------------------------------------------------------


def test_one_error_lists_every_bad_row(tmp_path):
    rows = [
        {"text": "fine", "label": "good"},
        {"text": "", "label": "good"},
        {"text": "fine", "label": "meh"},
        {"text": None, "label": None},
        {"text": 5, "label": 2},
        {"txt": "fine", "label": -1},
        {"text": "fine", "label": 1.5},
        {"text": "fine", "label": ""},
    ]
    source = as_json_lines(rows, tmp_path)
    with pytest.raises(DataError) as caught:
        prepared(source, tmp_path, REVIEW_LABELS)
    named = "correct it, or name all classes, in order, in training.labels"
    assert str(caught.value).splitlines() == [
        f"8 problems in the data at {source}:",
        f"  1. {source}, line 2: empty; remove it, or put the missing text in",
        f"  2. {source}, line 3: the label 'meh' is unknown, the labels are bad, good; {named}",
        f"  3. {source}, line 4: no text; put it in, or leave the record out",
        f"  4. {source}, lines 4, 8: no label; put it in, or leave the record out",
        f"  5. {source}, line 5: the text is not a string; make it a string, or leave the record out",
        f"  6. {source}, line 5: the label 2 is none of the 2 classes 0 to 1; {named}",
        f"  7. {source}, line 6: no column 'text', but 'txt', 'label'; name the columns with "
        "training.text_column, pair_column and label_column, or rename them",
        f"  8. {source}, line 7: the label 1.5 is unknown, the labels are bad, good; {named}",
    ]
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize("form", FORMS)
def test_a_column_that_is_not_there_is_named_with_those_that_are(form, tmp_path):
    labelling = Labelling(Labels(2), pair_column="second", label_column="target")
    with pytest.raises(DataError, match=r"no column 'second', 'target', but 'text', 'label', 'id'"):
        prepared(form(REVIEWS, tmp_path), tmp_path, labelling)


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ({"tokens": ["a", "b"], "tags": [0]}, "not as many labels as words"),
        ({"tokens": "a b", "tags": [0, 0]}, "the text is not a list of words"),
        ({"tokens": ["a"], "tags": 0}, "the labels are not a list"),
        ({"tokens": [], "tags": []}, "row 0: empty"),
        ({"tokens": ["a", ""], "tags": [0, 0]}, "row 0: empty"),
        ({"tokens": ["a", 1], "tags": [0, 0]}, "the text is not a string"),
        ({"tokens": None, "tags": None}, r"no text(.|\n)*no label"),
        ({"tokens": ["a"], "tags": ["MISC"]}, "the label 'MISC' is unknown, the labels are O, PER, LOC"),
        ({"tokens": ["a"], "tags": [3]}, "the label 3 is none of the 3 classes 0 to 2"),
    ],
)
def test_what_is_wrong_with_words_is_said(row, what, tmp_path):
    with pytest.raises(DataError, match=what):
        prepared([row], tmp_path, TAG_LABELS)


def test_a_name_without_names_to_know_it_by_is_told_where_to_put_them(tmp_path):
    with pytest.raises(
        DataError, match=r"the label 'good' is no number; name the classes, .*training\.labels"
    ):
        prepared(REVIEWS, tmp_path, Labelling(Labels(2)))


def test_a_row_of_which_the_tokenizer_makes_nothing_is_a_fault(tmp_path):
    class Deaf(BytesTokenizer):
        def rows(self, length):
            encoder = super().rows(length)
            real = encoder.texts
            encoder.texts = lambda rows: [row._replace(ids=[], types=[]) for row in real(rows)]
            return encoder

    with pytest.raises(DataError, match="rows 0-3: the tokenizer makes no token of it"):
        prepared(REVIEWS, tmp_path, REVIEW_LABELS, tokenizer=Deaf())


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"text,label\na,0\nb\nc,1,2\n", "lines 3-4: not as many cells as the header names"),
        (b'text,label\na,0\n"b,1\n', "line 3: not valid CSV"),
        (b"text,label\na,0\nb\xff,1\n", "line 3: not UTF-8"),
        (b"text,label\n", "empty"),
        (b"", "empty"),
        (b"body,label\na,0\n", "no column 'text', but 'body', 'label'"),
        (b'text,label\n"two\nlines",0\n,1\n', "line 4: empty"),
    ],
)
def test_what_is_wrong_with_csv_is_said_with_its_line(content, what, tmp_path):
    (tmp_path / "a.csv").write_bytes(content)
    with pytest.raises(DataError, match=f"a.csv.*{what}"):
        prepared(tmp_path / "a.csv", tmp_path, Labelling(Labels(2)))


def test_a_byte_order_mark_and_very_long_cells_are_read(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"\xef\xbb\xbftext,label\n" + b"x" * 200_000 + b",1\n\n")
    assert all_rows(prepared(tmp_path / "a.csv", tmp_path, Labelling(Labels(2))))["labels"] == [1]


@pytest.mark.hf
def test_a_damaged_parquet_file_is_named_and_the_other_problems_too(tmp_path):
    folder = tmp_path / "rows"
    folder.mkdir()
    whole = as_parquet(REVIEWS, folder).read_bytes()
    (folder / "rows.parquet").write_bytes(whole[: len(whole) // 2])
    as_json_lines([{"text": "", "label": 0}], folder)
    with pytest.raises(
        DataError, match=r"rows\.jsonl, line 1: empty(.|\n)*rows\.parquet: not a Parquet file"
    ):
        prepared(folder, tmp_path, REVIEW_LABELS)


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"a\.parquet needs pyarrow: pip install 'mpsdk\[hf\]'"):
        prepared(tmp_path / "a.parquet", tmp_path, REVIEW_LABELS)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere.csv", "nowhere.csv does not exist"),
        ([1, 2, 3], "can't be a list; pass a .jsonl, .csv or .parquet file"),
        ({"train": REVIEWS}, r"dict of data sets \('train'\)"),
    ],
)
def test_a_source_that_is_no_table_is_refused(source, message, tmp_path):
    with pytest.raises(DataError, match=message):
        prepared(source, tmp_path, REVIEW_LABELS)


def test_a_length_without_room_for_one_token_of_each_text_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"at least 4 tokens, .*sequence_length is 3"):
        prepared(PAIRS, tmp_path, PAIR_LABELS, sequence_length=3)


def test_very_many_kinds_of_problems_stay_a_message_of_bounded_length(tmp_path):
    rows = [{"text": "a", "label": f"class {number}"} for number in range(1000)]
    with pytest.raises(DataError) as caught:
        prepared(rows, tmp_path, REVIEW_LABELS)
    lines = str(caught.value).splitlines()
    assert len(lines) == 102 and lines[-1] == "  and at 900 more places something else"


# -- labels --------------------------------------------------------------------------------------------------------


@given(st.lists(st.text(min_size=1), min_size=2, max_size=9, unique=True))
def test_a_name_is_the_number_of_its_place_even_where_names_are_numbers(names):
    labels = Labels(len(names), tuple(names))
    assert [labels.number(name) for name in names] == list(range(len(names)))


@given(st.integers(1, 20), st.integers(-5, 25))
def test_a_number_is_taken_as_it_is_however_it_is_written(count, number):
    labels = Labels(count)
    found = {
        labels.number(value) for value in (number, float(number), str(number), np.float32(number).item())
    }
    assert found == {number} if 0 <= number < count else not any(isinstance(value, int) for value in found)


def test_json_in_a_cell_of_csv_must_be_a_list(tmp_path):
    (tmp_path / "a.csv").write_text("tokens,tags\n" + '"{""a"": 1}",' + json.dumps(0) + "\n")
    with pytest.raises(DataError, match=r"not a list of words(.|\n)*the labels are not a list"):
        prepared(tmp_path / "a.csv", tmp_path, TAG_LABELS)
