"""Rows of tokens, against transformers' own: special tokens, pairs, cutting, filling up, words and their labels."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpsdk.backend import IGNORED_LABEL
from mpsdk.config import Training
from mpsdk.data import BytesTokenizer, Labelling, Labels, encoding, load_tokenizer
from mpsdk.data.encoding import fitting
from mpsdk.errors import DataError
from mpsdk.inputs import ids_problems
from tests.core.data.labelled import prepared
from tests.core.data.samples import SHAKESPEARE

HAMLET = (SHAKESPEARE / "hamlet.txt").read_text()
KINDS = ["BERT", "RoBERTa", "GPT-2", "Llama"]


@pytest.fixture(scope="module", params=KINDS)
def directory(request, tmp_path_factory):
    """A directory with a small tokenizer of a kind, trained on Hamlet, as transformers saves it."""
    pytest.importorskip("transformers")
    path = tmp_path_factory.mktemp(request.param)
    make(request.param).save_pretrained(path)
    return path


def make(kind, **settings):
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    names = {
        "BERT": {
            "cls_token": "[CLS]",
            "sep_token": "[SEP]",
            "pad_token": "[PAD]",
            "mask_token": "[MASK]",
            "unk_token": "[UNK]",
        },
        "RoBERTa": {
            "bos_token": "<s>",
            "eos_token": "</s>",
            "cls_token": "<s>",
            "sep_token": "</s>",
            "pad_token": "<pad>",
            "mask_token": "<mask>",
        },
        "GPT-2": {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"},
        "Llama": {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>", "padding_side": "left"},
    }[kind]
    special = [value for name, value in names.items() if name.endswith("_token")]
    if kind == "BERT":
        backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        backend.normalizer = normalizers.BertNormalizer(lowercase=True)
        backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        trainer = trainers.WordPieceTrainer(vocab_size=500, special_tokens=special, show_progress=False)
    else:
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        trainer = trainers.BpeTrainer(
            vocab_size=500,
            special_tokens=list(dict.fromkeys(special)),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
    backend.train_from_iterator([HAMLET[:40_000]], trainer)
    if kind == "BERT":
        cls, sep = (("[CLS]", backend.token_to_id("[CLS]")), ("[SEP]", backend.token_to_id("[SEP]")))
        backend.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[cls, sep]
        )
    if kind == "RoBERTa":
        ends = [(name, backend.token_to_id(name)) for name in ("</s>", "<s>")]
        backend.post_processor = processors.RobertaProcessing(*ends, add_prefix_space=False)
    if kind == "Llama":
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", backend.token_to_id("<s>"))]
        )
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names, **settings)


def texts(count, seed):
    """Lines of Hamlet of very different lengths."""
    chance = random.Random(seed)
    lines = [line.strip() for line in HAMLET.splitlines() if line.strip()]
    return [" ".join(chance.sample(lines, chance.choice([1, 1, 3]))) for _ in range(count)]


def compare(rows, expected):
    for name in ("input_ids", "attention_mask"):
        assert np.array_equal(rows[name], expected[name]), name


@pytest.mark.hf
@pytest.mark.parametrize("length", [8, 16, 64])
@pytest.mark.parametrize("side", ["right", "left"])
def test_rows_are_those_that_transformers_makes(directory, tmp_path, length, side):
    from transformers import AutoTokenizer

    settings = json.loads((directory / "tokenizer_config.json").read_text())
    copy = tmp_path / "tokenizer"
    copy.mkdir()
    (copy / "tokenizer.json").write_bytes((directory / "tokenizer.json").read_bytes())
    settings |= {"padding_side": side, "truncation_side": side}
    (copy / "tokenizer_config.json").write_text(json.dumps(settings))
    reference = AutoTokenizer.from_pretrained(str(copy))
    how = {"padding": "max_length", "truncation": True, "max_length": length, "return_tensors": "np"}
    first, second = texts(40, 1), texts(40, 2)
    options = {"tokenizer": load_tokenizer("auto", copy), "sequence_length": length}
    single = prepared(
        [{"text": text, "label": 0} for text in first], tmp_path, Labelling(Labels(2)), **options
    )
    rows = single.rows(np.arange(40))
    expected = reference(first, return_token_type_ids=True, **how)
    compare(rows, expected)
    assert np.array_equal(rows["token_type_ids"], expected["token_type_ids"])

    pairs = [{"text": a, "other": b, "label": 0} for a, b in zip(first, second, strict=True)]
    both = prepared(pairs, tmp_path, Labelling(Labels(2), pair_column="other"), **options)
    expected = reference(first, second, return_token_type_ids=True, **how)
    rows = both.rows(np.arange(40))
    compare(rows, expected)
    assert np.array_equal(rows["token_type_ids"], expected["token_type_ids"])


@pytest.mark.hf
@pytest.mark.parametrize("kind", ["BERT", "RoBERTa"])
@pytest.mark.parametrize("length", [12, 48])
def test_labels_of_words_stand_where_the_examples_of_transformers_put_them(tmp_path, kind, length):
    """Byte-level tokenizers are asked for with add_prefix_space=True there: a word is read as it is after a space."""
    pytest.importorskip("transformers")
    reference = make(kind)
    reference.save_pretrained(tmp_path / "tokenizer")
    if kind == "RoBERTa":
        reference.backend_tokenizer.pre_tokenizer.add_prefix_space = True
    chance = random.Random(3)
    rows = [
        {"text": line.split(), "label": [chance.randrange(5) for _ in line.split()]} for line in texts(40, 3)
    ]
    dataset = prepared(
        rows,
        tmp_path,
        Labelling(Labels(5), words=True),
        tokenizer=load_tokenizer("auto", tmp_path / "tokenizer"),
        sequence_length=length,
    )
    found = dataset.rows(np.arange(40))
    encoded = reference(
        [row["text"] for row in rows],
        is_split_into_words=True,
        truncation=True,
        padding="max_length",
        max_length=length,
    )
    compare(found, {name: np.array(encoded[name]) for name in ("input_ids", "attention_mask")})
    for number, row in enumerate(rows):  # examples/pytorch/token-classification/run_ner.py
        labels, before = [], None
        for word in encoded.word_ids(batch_index=number):
            labels.append(IGNORED_LABEL if word is None or word == before else row["label"][word])
            before = word
        assert found["labels"][number].tolist() == labels


@pytest.mark.hf
def test_a_word_that_leaves_no_token_is_told_and_a_row_of_such_words_is_refused(tmp_path, caplog):
    pytest.importorskip("transformers")
    make("BERT").save_pretrained(tmp_path / "tokenizer")
    options = {"tokenizer": load_tokenizer("auto", tmp_path / "tokenizer"), "sequence_length": 8}
    labelling = Labelling(Labels(2), words=True)
    silent = "\x00"  # which BERT's normalizer takes away
    rows = [{"text": ["to", silent, "be"], "label": [0, 1, 1]}, {"text": ["or"], "label": [1]}]
    dataset = prepared(rows, tmp_path, labelling, **options)
    labels = dataset.rows(np.array([0]))["labels"][0]
    assert labels[labels != IGNORED_LABEL].tolist() == [0, 1]
    assert "in 1 of 2 rows the tokenizer makes no token of some word, whose label is lost" in caplog.text
    with pytest.raises(DataError, match="row 1: the tokenizer makes no token of it"):
        prepared([rows[1], {"text": [silent], "label": [0]}], tmp_path, labelling, **options)


@pytest.mark.hf
def test_the_special_tokens_are_those_that_transformers_knows(directory):
    from transformers import AutoTokenizer

    reference = AutoTokenizer.from_pretrained(str(directory))
    specials = load_tokenizer("auto", directory).specials
    assert specials.ids == tuple(sorted(set(reference.all_special_ids)))
    assert specials.pad == reference.pad_token_id
    assert specials.mask == reference.mask_token_id
    assert specials.pads_left == (reference.padding_side == "left")
    text = reference.encode("Hamlet", add_special_tokens=False)
    assert [*specials.prefix, *text, *specials.suffix] == reference.encode("Hamlet")


@pytest.mark.hf
def test_usual_names_of_special_tokens_are_taken_where_no_file_says(tmp_path):
    pytest.importorskip("transformers")
    stated = make("BERT")
    stated.backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer("auto", tmp_path)
    ids = (stated.sep_token_id, stated.pad_token_id, stated.mask_token_id)
    assert (tokenizer.end_of_document, tokenizer.specials.pad, tokenizer.specials.mask) == ids


@pytest.mark.hf
def test_a_tokenizer_without_a_mask_token_is_refused_for_masked_lm(tmp_path):
    pytest.importorskip("transformers")
    for kind, problems in (("GPT-2", 1), ("BERT", 0)):
        make(kind).save_pretrained(tmp_path / kind)
        training = Training(objective="masked-lm", tokenizer=str(tmp_path / kind))
        found = ids_problems(training, load_tokenizer(tmp_path / kind), None)
        assert len(found) == problems
        assert all("has no mask token" in problem.remedy for problem in found)
    short = Training(objective="masked-lm", tokenizer=str(tmp_path / "BERT"), sequence_length=2)
    (problem,) = ids_problems(short, load_tokenizer(tmp_path / "BERT"), None)
    assert (problem.field, "must be at least 3" in problem.remedy) == ("training.sequence_length", True)


@pytest.mark.hf
@settings(deadline=None, max_examples=200)
@given(st.integers(0, 20), st.integers(0, 20), st.integers(0, 20))
def test_two_texts_are_cut_as_tokenizers_cuts_them(first, second, room):
    tokenizers = pytest.importorskip("tokenizers")
    from tokenizers import models, pre_tokenizers

    backend = tokenizers.Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.enable_truncation(room, strategy="longest_first")
    if first + second <= room or room == 0:
        return
    ids = backend.encode("a " * first, "b " * second).ids
    assert fitting([first, second], room) == [ids.count(0), ids.count(1)]


@given(st.text(min_size=1), st.text(min_size=1), st.integers(4, 30))
def test_bytes_of_a_pair_fill_the_room_and_begin_as_the_texts_do(first, second, length):
    ((ids, types, words, cut),) = BytesTokenizer().rows(length).texts([(first, second)])
    parts = [[i for i, kind in zip(ids, types, strict=True) if kind == which] for which in (0, 1)]
    whole = [[*text.encode(), 256] for text in (first, second)]
    assert len(ids) == min(length, sum(map(len, whole)))
    assert cut == (len(ids) < sum(map(len, whole)))
    assert all(part[-1] == 256 for part in parts) and set(words) == {-1}
    assert all(part[:-1] == text[: len(part) - 1] for part, text in zip(parts, whole, strict=True))


def test_the_examples_in_the_docstrings_are_true():
    import doctest

    assert doctest.testmod(encoding).failed == 0
