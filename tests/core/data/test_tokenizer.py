"""Tokenizers: bytes, and those of Hugging Face directories, found without a network."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpsdk.data import BytesTokenizer, Tokenizer, load_tokenizer, pieces, prepare
from mpsdk.errors import ConfigError
from tests.core.data.samples import SHAKESPEARE

HAMLET = (SHAKESPEARE / "hamlet.txt").read_text()


@settings(deadline=None)
@given(st.text())
def test_bytes_are_the_utf_8_of_the_text_and_decode_to_it(text):
    tokenizer = BytesTokenizer()
    assert isinstance(tokenizer, Tokenizer)
    ids = tokenizer.encode(text)
    assert ids == list(text.encode())
    assert [array.tolist() for array in tokenizer.encode_many([text, text])] == [ids, ids]
    assert tokenizer.decode([*ids, tokenizer.end_of_document]) == text


def test_bytes_that_are_not_text_decode_to_the_replacement_character():
    assert load_tokenizer("bytes").decode([65, 255, 256, 66]) == "A�B"


@given(st.text())
def test_the_special_tokens_of_bytes_are_in_no_text(text):
    tokenizer = BytesTokenizer()
    assert {tokenizer.specials.pad, tokenizer.specials.mask, tokenizer.end_of_document}.isdisjoint(
        text.encode()
    )
    assert max(tokenizer.specials.ids) < tokenizer.vocab_size


def test_tokenizer_libraries_are_imported_only_when_used():
    script = (
        "import sys, mpsdk.data; mpsdk.data.load_tokenizer('bytes'); "
        "print({'tokenizers', 'transformers', 'datasets', 'torch'} & set(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout == "set()\n"


@pytest.mark.parametrize(
    ("spec", "directory", "message"),
    [
        ("auto", None, "training.tokenizer .*no directory.*'bytes' or a path"),
        ("auto", "empty", "there is no tokenizer in"),
        ("byte", None, "neither 'auto', 'bytes' nor the path"),
    ],
)
def test_a_tokenizer_that_is_not_there_is_said_by_its_field(tmp_path, spec, directory, message):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=message):
        load_tokenizer(spec, directory and tmp_path / directory)


# --- Hugging Face ---------------------------------------------------------------------------------------------------

END = "<|endoftext|>"


@pytest.fixture(scope="module")
def trained():
    """A byte-level BPE of GPT-2's kind, 600 tokens, trained on Hamlet."""
    tokenizers = pytest.importorskip("tokenizers")
    from tokenizers import decoders, models, pre_tokenizers, trainers

    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([HAMLET], trainer)
    return tokenizer


@pytest.fixture
def directory(trained, tmp_path):
    """A model directory with that tokenizer."""
    path = tmp_path / "model"
    path.mkdir()
    trained.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps({"eos_token": END}))
    return path


@pytest.mark.hf
def test_a_model_directory_is_read_as_transformers_reads_it(directory):
    tokenizer = load_tokenizer("auto", directory)
    transformers = pytest.importorskip("transformers")
    reference = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(directory / "tokenizer.json"), eos_token=END
    )
    assert isinstance(tokenizer, Tokenizer)
    assert (tokenizer.vocab_size, tokenizer.end_of_document) == (len(reference), reference.eos_token_id)
    text = HAMLET[:5000] + f" naïve 🙂{END}"
    expected = reference.encode(text, add_special_tokens=False)
    assert tokenizer.encode(text) == expected
    assert [ids.tolist() for ids in tokenizer.encode_many([text, "a", ""])] == [
        expected,
        tokenizer.encode("a"),
        [],
    ]
    assert tokenizer.decode(expected) == text.removesuffix(END)


@pytest.mark.hf
def test_a_path_may_name_the_directory_or_the_file(directory):
    named = [load_tokenizer(path) for path in (str(directory), directory, directory / "tokenizer.json")]
    assert len({(t.fingerprint, t.vocab_size, t.end_of_document) for t in named}) == 1


@pytest.mark.hf
def test_a_model_saved_by_transformers_is_read(trained, tmp_path):
    transformers = pytest.importorskip("transformers")
    transformers.PreTrainedTokenizerFast(tokenizer_object=trained, eos_token=END).save_pretrained(tmp_path)
    assert load_tokenizer("auto", tmp_path).end_of_document == trained.token_to_id(END)


@pytest.mark.hf
def test_an_older_vocabulary_is_converted_by_transformers(trained, directory, tmp_path):
    pytest.importorskip("transformers")
    older = tmp_path / "older"
    older.mkdir()
    trained.model.save(str(older))  # vocab.json, merges.txt
    (older / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    tokenizer = load_tokenizer("auto", older)
    assert tokenizer.encode(HAMLET) == load_tokenizer("auto", directory).encode(HAMLET)
    assert tokenizer.end_of_document == trained.token_to_id(END)


@pytest.mark.hf
def test_truncation_padding_and_special_tokens_of_a_task_are_not_applied(trained, directory):
    from tokenizers import Tokenizer as Library
    from tokenizers.processors import TemplateProcessing

    task = Library.from_str(trained.to_str())
    task.enable_truncation(8)
    task.enable_padding(length=16)
    task.post_processor = TemplateProcessing(single=f"$A {END}", special_tokens=[(END, 0)])
    task.save(str(directory / "tokenizer.json"))
    tokenizer = load_tokenizer("auto", directory)
    expected = trained.encode(HAMLET, add_special_tokens=False).ids
    assert tokenizer.encode(HAMLET) == expected
    assert tokenizer.encode_many([HAMLET, "a"])[0].tolist() == expected
    assert tokenizer.encode_many([HAMLET, "a"])[1].size == 1


@pytest.mark.hf
@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("tokenizer_config.json", {"eos_token": {"content": END, "lstrip": False}}),
        ("special_tokens_map.json", {"eos_token": END}),
        ("config.json", {"eos_token_id": 0}),
        ("config.json", {"eos_token_id": [0, 5]}),
        ("tokenizer_config.json", {"eos_token": None, "sep_token": END}),
    ],
)
def test_the_end_of_a_document_is_found_where_models_say_it(directory, file, content):
    (directory / "tokenizer_config.json").unlink()
    (directory / file).write_text(json.dumps(content))
    assert load_tokenizer("auto", directory).end_of_document == 0


@pytest.mark.hf
@pytest.mark.parametrize("config", [{}, {"eos_token": "<unknown>"}])
def test_a_directory_that_names_no_end_of_document_is_refused(directory, config):
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r'add "eos_token" to tokenizer_config\.json'):
        load_tokenizer("auto", directory)


@pytest.mark.hf
def test_an_end_of_document_outside_the_vocabulary_is_refused(directory):
    (directory / "tokenizer_config.json").unlink()
    (directory / "config.json").write_text(json.dumps({"eos_token_id": 50256}))
    with pytest.raises(ConfigError, match="says which token ends a document"):
        load_tokenizer("auto", directory)


@pytest.mark.hf
def test_files_that_are_no_tokenizer_are_refused(directory):
    (directory / "tokenizer.json").write_text("{")
    with pytest.raises(ConfigError, match="can't be read as a tokenizer"):
        load_tokenizer("auto", directory)
    (directory / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match="there is no usable tokenizer in"):
        load_tokenizer("auto", directory)


@pytest.mark.hf
def test_the_fingerprint_follows_what_the_ids_depend_on(trained, directory):
    tokenizer = load_tokenizer("auto", directory)
    assert load_tokenizer("auto", directory).fingerprint == tokenizer.fingerprint
    (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": "!"}))
    other_end = load_tokenizer("auto", directory)
    trained.add_tokens(["Hamlet"])
    trained.save(str(directory / "tokenizer.json"))
    other_vocabulary = load_tokenizer("auto", directory)
    assert len({t.fingerprint for t in (tokenizer, other_end, other_vocabulary)}) == 3


LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@pytest.mark.hf
@pytest.mark.parametrize("kind", ["GPT-2", "Llama 3"])
def test_a_corpus_prepared_in_pieces_is_the_corpus_encoded_whole(
    trained, directory, tmp_path, monkeypatch, kind
):
    from tokenizers import Regex, pre_tokenizers
    from tokenizers import Tokenizer as Library

    if kind == "Llama 3":
        other = Library.from_str(trained.to_str())
        split = pre_tokenizers.Split(Regex(LLAMA_3), "isolated")
        bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        other.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_only])
        other.save(str(directory / "tokenizer.json"))
    monkeypatch.setattr(pieces, "PIECE", 300)
    tokenizer = load_tokenizer("auto", directory)
    dataset = prepare(
        SHAKESPEARE / "hamlet.txt", tokenizer=tokenizer, sequence_length=16, cache_directory=tmp_path
    )
    assert np.array_equal(dataset.token_ids, [*tokenizer.encode(HAMLET), tokenizer.end_of_document])


@pytest.mark.hf
def test_a_library_that_is_not_installed_is_named_with_how_to_install_it(directory, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ConfigError, match=r"needs the tokenizers library: pip install 'mpsdk\[hf\]'"):
        load_tokenizer("auto", directory)
    monkeypatch.setitem(sys.modules, "transformers", None)
    (directory / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match=r"older tokenizer needs transformers: pip install 'mpsdk\[hf\]'"):
        load_tokenizer("auto", directory)


@pytest.mark.hf
def test_a_tokenizer_without_a_fast_form_is_refused(directory, monkeypatch):
    transformers = pytest.importorskip("transformers")
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *_, **__: object())
    (directory / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match=r"no fast form; save it as a tokenizer\.json first"):
        load_tokenizer("auto", directory)
