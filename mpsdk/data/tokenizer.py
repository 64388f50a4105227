"""Text to token ids: plain bytes, or the tokenizer of a Hugging Face model directory."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, cast, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from mpsdk.data.encoding import BytesRows, HuggingFaceRows, RowEncoder, Specials
from mpsdk.errors import ConfigError, Problem

if TYPE_CHECKING:
    import tokenizers

FIELD = "training.tokenizer"
TOKENIZER_FILE = "tokenizer.json"
USUAL = {"sep_token": ("[SEP]",), "pad_token": ("[PAD]", "<pad>"), "mask_token": ("[MASK]", "<mask>")}
"""What transformers' tokenizers call these tokens where their files don't say."""
INSTALL = "pip install 'mpsdk[hf]'"


@runtime_checkable
class Tokenizer(Protocol):
    """What the data room needs of a tokenizer. But for `rows`, no special tokens are added; documents are ended by the
    caller."""

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        ...

    @property
    def end_of_document(self) -> int: ...

    @property
    def fingerprint(self) -> str:
        """Equal for tokenizers that give equal ids; part of the key under which tokenised data are kept."""
        ...

    @property
    def specials(self) -> Specials: ...

    def rows(self, length: int) -> RowEncoder:
        """What makes rows of at most `length` tokens, with special tokens."""
        ...

    def encode(self, text: str) -> list[int]: ...

    def encode_many(self, texts: Sequence[str]) -> list[NDArray[np.uint32]]:
        """The ids of each text, as `encode` would give them."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`. The end of a document has no text."""
        ...


class BytesTokenizer:
    """The bytes of the UTF-8 text, ids 0 to 255; 256 ends a document, or a text of a row.

    Two bytes that UTF-8 never has serve as special tokens: 254 fills rows up, 255 masks.

    >>> BytesTokenizer().encode("né")
    [110, 195, 169]
    """

    vocab_size = 257
    end_of_document = 256
    fingerprint = "bytes-1"
    specials = Specials(pad=254, mask=255, ids=(254, 255, 256))

    def rows(self, length: int) -> RowEncoder:
        return BytesRows(length, end=self.end_of_document)

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def encode_many(self, texts: Sequence[str]) -> list[NDArray[np.uint32]]:
        return [np.frombuffer(text.encode(), dtype=np.uint8).astype(np.uint32) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`; bytes that are not UTF-8, as an untrained model makes them, become U+FFFD."""
        return bytes(i for i in ids if i != self.end_of_document).decode(errors="replace")


@dataclass(frozen=True)
class HuggingFaceTokenizer:
    """A tokenizer of the `tokenizers` library. Special tokens that stand in a text as such become their ids."""

    backend: tokenizers.Tokenizer
    vocab_size: int
    end_of_document: int
    fingerprint: str
    specials: Specials

    def rows(self, length: int) -> RowEncoder:
        return HuggingFaceRows(self.backend, length, cuts_left=self.specials.cuts_left)

    def encode(self, text: str) -> list[int]:
        return self.backend.encode(text, add_special_tokens=False).ids

    def encode_many(self, texts: Sequence[str]) -> list[NDArray[np.uint32]]:
        encodings = self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.asarray(encoding.ids, dtype=np.uint32) for encoding in encodings]

    def decode(self, ids: Sequence[int]) -> str:
        kept = [i for i in ids if i != self.end_of_document]
        return self.backend.decode(kept, skip_special_tokens=False)


def load_tokenizer(spec: str | Path, model_directory: str | Path | None = None) -> Tokenizer:
    """The tokenizer that `training.tokenizer` names.

    Args:
        spec: "auto", the model directory's; "bytes"; or the path of a directory or of a tokenizer.json.
        model_directory: where "auto" looks.

    Raises ConfigError when there is none there, or none that knows how a document ends. Nothing is downloaded.
    """
    if spec == "bytes":
        return BytesTokenizer()
    if spec == "auto":
        if model_directory is None:
            raise _problem(spec, "the model has no directory to take a tokenizer from; use 'bytes' or a path")
        return _load(Path(model_directory), spec)
    if not Path(spec).exists():
        raise _problem(spec, "is neither 'auto', 'bytes' nor the path of a directory with a tokenizer.json")
    return _load(Path(spec), spec)


def _load(path: Path, spec: str | Path) -> HuggingFaceTokenizer:
    file = path if path.is_file() else path / TOKENIZER_FILE
    backend, named = _from_file(file, spec) if file.exists() else _from_transformers(path, spec)
    # A tokenizer.json may carry the truncation and padding of the task that it was last used for.
    backend.no_truncation()
    backend.no_padding()
    vocab_size = 1 + max(backend.get_vocab(with_added_tokens=True).values(), default=-1)
    end = named.end
    if end is None or not 0 <= end < vocab_size:
        raise _problem(
            spec,
            f"nothing in {file.parent} says which token ends a document; "
            'add "eos_token" to tokenizer_config.json, with a token of the vocabulary',
        )
    identity = hashlib.blake2b(backend.to_str().encode(), digest_size=16)
    identity.update(str(end).encode())
    specials = _specials(backend, named, end)
    return HuggingFaceTokenizer(backend, vocab_size, end, identity.hexdigest(), specials)


class _Named(NamedTuple):
    """What is written beside a tokenizer: the ids of some tokens, and at which end rows are filled up and cut."""

    end: int | None
    pad: int | None
    mask: int | None
    padding_side: str
    truncation_side: str


def _specials(backend: tokenizers.Tokenizer, named: _Named, end: int) -> Specials:
    pad = end if named.pad is None else named.pad
    added = {i for i, token in backend.get_added_tokens_decoder().items() if token.special}
    stated = {i for i in (end, pad, named.mask) if i is not None}
    around = backend.encode("a")
    text = [place for place, special in enumerate(around.special_tokens_mask) if not special]
    return Specials(
        pad=pad,
        mask=named.mask,
        ids=tuple(sorted(added | stated)),
        prefix=tuple(around.ids[: text[0]]) if text else (),
        suffix=tuple(around.ids[text[-1] + 1 :]) if text else (),
        pads_left=named.padding_side == "left",
        cuts_left=named.truncation_side == "left",
    )


def _from_file(file: Path, spec: str | Path) -> tuple[tokenizers.Tokenizer, _Named]:
    try:
        import tokenizers
    except ImportError as error:
        raise _problem(spec, f"reading {file} needs the tokenizers library: {INSTALL}") from error
    try:
        backend = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises bare Exception
        raise _problem(spec, f"{file} can't be read as a tokenizer: {error}") from error
    directory = file.parent
    settings = _read(directory / "tokenizer_config.json")
    end = _token("eos_token", directory, backend)
    return backend, _Named(
        end=_token("sep_token", directory, backend) if end is None else end,  # BERT has only that
        pad=_token("pad_token", directory, backend),
        mask=_token("mask_token", directory, backend),
        padding_side=settings.get("padding_side", "right"),
        truncation_side=settings.get("truncation_side", "right"),
    )


def _token(role: str, directory: Path, backend: tokenizers.Tokenizer) -> int | None:
    """The id of the token that the files beside tokenizer.json name for `role`, else of what is usual, if it is there."""
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        token: Any = _read(directory / name).get(role)
        content = cast("dict[str, Any]", token).get("content") if isinstance(token, dict) else token
        if isinstance(content, str) and (found := backend.token_to_id(content)) is not None:
            return found
    identifiers: Any = _read(directory / "config.json").get(f"{role}_id")
    for identifier in cast("list[Any]", identifiers) if isinstance(identifiers, list) else [identifiers]:
        if isinstance(identifier, int):
            return identifier
    usual = (backend.token_to_id(content) for content in USUAL.get(role, ()))
    return next((found for found in usual if found is not None), None)


def _read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text("utf-8")) if file.exists() else {}


def _from_transformers(directory: Path, spec: str | Path) -> tuple[tokenizers.Tokenizer, _Named]:
    """Vocabulary files of an older kind (vocab.json and merges.txt, a sentencepiece model, ...), converted."""
    if not directory.is_dir() or not any(directory.iterdir()):
        raise _problem(spec, f"there is no tokenizer in {directory}")
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise _problem(
            spec,
            f"{directory} has no {TOKENIZER_FILE}; reading an older tokenizer needs transformers: {INSTALL}",
        ) from error
    try:
        loaded: Any = cast("Any", AutoTokenizer).from_pretrained(str(directory), local_files_only=True)
    except Exception as error:  # transformers raises OSError, ValueError, KeyError, ImportError, ...
        raise _problem(spec, f"there is no usable tokenizer in {directory}: {error}") from error
    backend = getattr(loaded, "backend_tokenizer", None)
    if backend is None:
        raise _problem(
            spec, f"the tokenizer in {directory} has no fast form; save it as a {TOKENIZER_FILE} first"
        )
    named = _Named(
        end=loaded.eos_token_id if loaded.eos_token_id is not None else loaded.sep_token_id,
        pad=loaded.pad_token_id,
        mask=loaded.mask_token_id,
        padding_side=loaded.padding_side,
        truncation_side=loaded.truncation_side,
    )
    return cast("tokenizers.Tokenizer", backend), named


def _problem(spec: str | Path, remedy: str) -> ConfigError:
    return ConfigError([Problem(FIELD, str(spec), remedy)], where="the tokenizer")
