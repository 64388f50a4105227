"""What data can come from, and how everything wrong with it is said at once."""

from __future__ import annotations

import logging
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpsdk.data import BytesTokenizer, pieces, prepare
from mpsdk.data.faults import Faults
from mpsdk.data.sources import open_source
from mpsdk.errors import DataError
from tests.core.data.labelled import FORMS, REVIEWS
from tests.core.data.samples import SHAKESPEARE, tokens_of

FILE_TEXT = "Ill met by moonlight, proud Titania — ”\r\n"


def read(source, tmp_path, **options):
    """All token ids that the bytes tokenizer makes of `source`."""
    options = {"tokenizer": BytesTokenizer(), "sequence_length": 1, **options}
    return prepare(source, cache_directory=tmp_path / "cache", **options).token_ids.tolist()


def test_a_text_file_is_one_document_and_its_text_is_kept_as_it_is(tmp_path):
    (tmp_path / "a.txt").write_bytes(FILE_TEXT.encode())
    assert read(str(tmp_path / "a.txt"), tmp_path) == tokens_of(FILE_TEXT)


def test_a_byte_order_mark_is_not_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfwords")
    (tmp_path / "b.jsonl").write_bytes(b"\xef\xbb\xbf" + b'{"text": "words"}')
    assert read(tmp_path / "a.txt", tmp_path) == tokens_of("words")
    assert read(tmp_path / "b.jsonl", tmp_path) == tokens_of("words")


def test_json_lines_are_a_document_each_and_blank_lines_are_none(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "one", "id": 1}\n\n{"body": "x", "text": "zw\\u00f6\\n"}\r\n  \n')
    assert read(file, tmp_path) == tokens_of("one", "zwö\n")
    file.write_text('{"body": "x"}')
    assert read(file, tmp_path, text_column="body") == tokens_of("x")


@pytest.mark.parametrize("form", FORMS)
def test_a_row_of_any_table_is_a_document(form, tmp_path):
    source = form(REVIEWS, tmp_path)
    assert read(source, tmp_path) == tokens_of(*(row["text"] for row in REVIEWS))
    with pytest.raises(DataError, match="no column 'body', but 'text', 'label', 'id'"):
        read(source, tmp_path, text_column="body")


def test_a_directory_is_read_in_the_order_of_its_paths(tmp_path, caplog):
    corpus = tmp_path / "corpus"
    (corpus / "b").mkdir(parents=True)
    (corpus / "c.txt").write_text("third")
    (corpus / "b" / "a.TXT").write_text("second")
    (corpus / "a.jsonl").write_text('{"text": "first"}\n')
    for ignored in (".hidden.txt", "README.md", "table.xlsx"):
        (corpus / ignored).write_text("no")
    with caplog.at_level(logging.WARNING):
        assert read(corpus, tmp_path) == tokens_of("first", "second", "third")
    assert [record.message for record in caplog.records] == [
        f"{corpus}: not read, no .txt, .jsonl, .csv or .parquet: table.xlsx"
    ]


@pytest.mark.parametrize("kind", [list, tuple, np.array, lambda ids: np.array(ids, dtype=np.uint16)])
def test_a_row_of_token_ids_is_taken_as_it_is(tmp_path, kind):
    assert read(kind([5, 6, 256, 7]), tmp_path) == [5, 6, 256, 7]


@pytest.mark.parametrize("kind", [list, np.array, lambda rows: [np.array(row) for row in rows]])
def test_rows_of_token_ids_are_documents_and_each_is_ended_once(tmp_path, kind):
    assert read(kind([[5, 6], [7, 256]]), tmp_path) == [5, 6, 256, 7, 256]


def test_token_ids_longer_than_a_piece_arrive_whole(tmp_path):
    ids = np.arange(3 * pieces.PIECE + 1) % 256
    assert read(ids, tmp_path) == ids.tolist()
    assert read([ids, ids[:5]], tmp_path) == [*ids.tolist(), 256, *ids[:5].tolist(), 256]


def test_equal_content_is_equal_wherever_it_lies_and_different_content_differs(tmp_path):
    def digest(name, content):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
        return open_source(tmp_path / name, vocab_size=257).digest()

    same = digest("a/x.txt", "text")
    assert digest("b/y.txt", "text") == same
    assert digest("a/x.txt", "Text") != same
    both = open_source(tmp_path, vocab_size=257).digest()
    assert both not in (same, digest("c.txt", "Texttext"))


def test_token_ids_differ_when_their_documents_do():
    sources = ([1, 2, 3], [[1, 2, 3]], [[1, 2], [3]], [[1], [2, 3]], [[1], [2], [3]])
    assert len({open_source(source, vocab_size=9).digest() for source in sources}) == 5
    assert len({open_source(np.array([1, 2], dtype=t), vocab_size=9).digest() for t in "bBhHiIlL"}) == 1


# --- everything that is wrong, at once ------------------------------------------------------------------------------


def test_one_error_lists_every_bad_file_and_line(tmp_path):
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    good = '{"text": "good"}'
    bad = [
        "{",
        "[1]",
        '{"txt": "a"}',
        '{"text": 5}',
        '{"text": ""}',
        '{"text": "\\ud800"}',
        good,
        "{",
        "{",
        "{",
    ]
    (corpus / "a.jsonl").write_text("\n".join([good, *bad]))
    (corpus / "b.jsonl").write_bytes(b'{"text": "\xff"}\n')
    (corpus / "c.txt").write_bytes(b"fine\nn\xe4chste\nfine\n\xff\n\xff")
    (corpus / "d.txt").write_text("")
    (corpus / "e.jsonl").write_text("\n\n")
    (corpus / "f.txt").write_text("good")
    with pytest.raises(DataError) as caught:
        read(corpus, tmp_path)
    assert str(caught.value).splitlines() == [
        f"10 problems in the data at {corpus}:",
        f"  1. {corpus}/a.jsonl, lines 2, 9-11: not valid JSON; write one JSON object on each line",
        f"  2. {corpus}/a.jsonl, line 3: not a JSON object; write one object on each line, "
        'such as {"text": "..."}',
        f"  3. {corpus}/a.jsonl, line 4: no column 'text', but 'txt'; name the columns with "
        "training.text_column, pair_column and label_column, or rename them",
        f"  4. {corpus}/a.jsonl, line 5: the text is not a string; make it a string, or leave the record out",
        f"  5. {corpus}/a.jsonl, line 6: empty; remove it, or put the missing text in",
        f"  6. {corpus}/a.jsonl, line 7: half of a surrogate pair; write the whole character, "
        "or remove the escape \\uD800 to \\uDFFF",
        f"  7. {corpus}/b.jsonl, line 1: not UTF-8 text; save it as UTF-8, for example: "
        "iconv -f ISO-8859-1 -t UTF-8 OLD > NEW",
        f"  8. {corpus}/c.txt, lines 2, 4-5: not UTF-8 text; save it as UTF-8, for example: "
        "iconv -f ISO-8859-1 -t UTF-8 OLD > NEW",
        f"  9. {corpus}/d.txt: empty; remove it, or put the missing text in",
        f"  10. {corpus}/e.jsonl: empty; remove it, or put the missing text in",
    ]
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_broken_character_late_in_a_long_file_is_found(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"line\n" * 500_000 + b"\xc3")
    with pytest.raises(DataError, match="line 500001: not UTF-8"):
        read(tmp_path / "a.txt", tmp_path)


def test_very_many_bad_lines_stay_a_short_message(tmp_path):
    (tmp_path / "a.jsonl").write_text('{\n{"text": "good"}\n' * 1000)
    with pytest.raises(DataError, match=r"lines 1, 3, 5, .*, 199 and 900 more: not valid JSON") as caught:
        read(tmp_path / "a.jsonl", tmp_path)
    assert len(str(caught.value)) < 1000


def test_unreadable_files_are_listed_together(tmp_path):
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).symlink_to(tmp_path / "gone")
    with pytest.raises(DataError, match=r"2 problems(.|\n)*a.txt: can't be read(.|\n)*b.txt: can't be read"):
        read(tmp_path, tmp_path)


def test_a_file_that_goes_while_it_is_read_is_noted(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    source = open_source(tmp_path, vocab_size=257)
    (tmp_path / "a.txt").unlink()
    faults = Faults("here")
    assert list(source.pieces(faults)) == []
    with pytest.raises(DataError, match=r"a\.txt: can't be read"):
        faults.raise_if_any()


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([[1], [], [300], [-1], [2], [1.5], [[1]]], r"documents 2-3: token ids outside \[0, 257\)"),
        ([[1], [], [1.5], [[1]]], "document 1: empty"),
        ([[1], [], [1.5], [[1]]], "documents 2-3: not a one-dimensional list"),
        ([1, 2, 257], r"the token ids: token ids outside \[0, 257\)"),
        ([], "the token ids: empty"),
        (np.array([1.0, 2.0]), "the token ids: not a one-dimensional list"),
        (np.array([True, False]), "not a one-dimensional list"),
        (np.array(3), "not a one-dimensional list"),
        ([1, [2]], "not a one-dimensional list"),
        ([2**70], "not a one-dimensional list"),
    ],
)
def test_token_ids_that_cannot_be_used_are_listed(tmp_path, ids, message):
    with pytest.raises(DataError, match=message):
        read(ids, tmp_path)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere.txt", "nowhere.txt does not exist"),
        (["a.txt", "b.txt"], "pass a directory"),
        ({"train": [1]}, r"dict of data sets \('train'\)"),
        (7, "can't be a int; pass a .txt, .jsonl, .csv or .parquet file"),
    ],
)
def test_a_source_of_no_known_kind_is_refused(tmp_path, source, message):
    with pytest.raises(DataError, match=message):
        read(source, tmp_path)


def test_a_path_of_no_known_kind_is_refused(tmp_path):
    (tmp_path / "a.pdf").write_text("a")
    with pytest.raises(DataError, match=r"a\.pdf does not end in \.txt, \.jsonl, \.csv or \.parquet"):
        read(tmp_path / "a.pdf", tmp_path)
    with pytest.raises(DataError, match=r"has no \.txt, \.jsonl, \.csv or \.parquet file"):
        read(tmp_path, tmp_path)


# --- pieces ---------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.lists(st.text(alphabet="ab \n\tö", max_size=60), max_size=8), st.integers(1, 40))
def test_a_document_is_cut_alike_however_it_is_handed_over(portions, limit):
    text = "".join(portions)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces, "PIECE", limit)
        cuts = list(pieces.cut(portions))
        assert cuts == list(pieces.cut([text]))
    assert "".join(piece.content for piece in cuts) == text
    assert all(0 < len(piece.content) <= limit for piece in cuts)
    assert [piece.ends_document for piece in cuts] == [False] * (len(cuts) - 1) + [True] * bool(text)


def test_a_piece_ends_at_the_last_line_end_else_before_the_last_word(monkeypatch):
    monkeypatch.setattr(pieces, "PIECE", 12)
    assert [piece.content for piece in pieces.cut(["one\ntwo\n\nthree four five sixseveneight"])] == [
        "one\ntwo\n\n",
        "three four",
        " five",
        " sixseveneig",
        "ht",
    ]


def test_reading_a_long_file_takes_no_more_memory_than_a_few_pieces(tmp_path):
    (tmp_path / "long.txt").write_text((SHAKESPEARE / "hamlet.txt").read_text() * 150)  # 26 MB
    tracemalloc.start()
    prepare(
        tmp_path / "long.txt",
        tokenizer=BytesTokenizer(),
        sequence_length=8,
        cache_directory=tmp_path / "cache",
    )
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 20_000_000


# --- Hugging Face datasets ------------------------------------------------------------------------------------------


@pytest.mark.hf
@pytest.mark.parametrize("streaming", [False, True])
def test_a_hugging_face_dataset_is_a_document_a_row(tmp_path, streaming):
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"text": [f"row {i}" for i in range(2500)], "label": list(range(2500))})
    rows = rows.to_iterable_dataset() if streaming else rows
    assert read(rows, tmp_path) == tokens_of(*(f"row {i}" for i in range(2500)))


@pytest.mark.hf
def test_what_is_wrong_with_a_hugging_face_dataset_is_listed(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"text": ["a", None, "", "", "b"]})
    with pytest.raises(DataError, match=r"row 1: no text;(.|\n)*rows 2-3: empty"):
        read(rows, tmp_path)
    with pytest.raises(DataError, match=r"no column 'text', but 'body'; .*training\.text_column"):
        read(rows.rename_column("text", "body"), tmp_path)
    with pytest.raises(DataError, match="the Hugging Face dataset: empty"):
        read(rows.select([]), tmp_path)
    with pytest.raises(DataError, match="dict of data sets"):
        read(datasets.DatasetDict({"train": rows}), tmp_path)


def test_the_vendored_corpus_is_shakespeare_and_nothing_else(tmp_path):
    held_out = SHAKESPEARE.with_name("shakespeare-validation")
    for folder, works in ((SHAKESPEARE, 14), (held_out, 1)):
        texts = [file.read_bytes().decode("ascii") for file in sorted(folder.glob("*.txt"))]
        assert len(texts) == works
        assert not [name for name in ("Gutenberg", "Etext", "http") if any(name in text for text in texts)]
        assert read(folder, tmp_path) == tokens_of(*texts)
