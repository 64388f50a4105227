"""Text to token ids: plain bytes, or the tokenizer of a Hugging Face model directory."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from mpsdk.errors import ConfigError, Problem

if TYPE_CHECKING:
    import tokenizers

FIELD = "training.tokenizer"
TOKENIZER_FILE = "tokenizer.json"
INSTALL = "pip install 'mpsdk[hf]'"


@runtime_checkable
class Tokenizer(Protocol):
    """What the data room needs of a tokenizer. No special tokens are added; documents are ended by the caller."""

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

    def encode(self, text: str) -> list[int]: ...

    def encode_many(self, texts: Sequence[str]) -> list[NDArray[np.uint32]]:
        """The ids of each text, as `encode` would give them."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`. The end of a document has no text."""
        ...


class BytesTokenizer:
    """The bytes of the UTF-8 text, ids 0 to 255; 256 ends a document.

    >>> BytesTokenizer().encode("né")
    [110, 195, 169]
    """

    vocab_size = 257
    end_of_document = 256
    fingerprint = "bytes-1"

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
    backend, end = _from_file(file, spec) if file.exists() else _from_transformers(path, spec)
    # A tokenizer.json may carry the truncation and padding of the task that it was last used for.
    backend.no_truncation()
    backend.no_padding()
    vocab_size = 1 + max(backend.get_vocab(with_added_tokens=True).values(), default=-1)
    if end is None or not 0 <= end < vocab_size:
        raise _problem(
            spec,
            f"nothing in {file.parent} says which token ends a document; "
            'add "eos_token" to tokenizer_config.json, with a token of the vocabulary',
        )
    identity = hashlib.blake2b(backend.to_str().encode(), digest_size=16)
    identity.update(str(end).encode())
    return HuggingFaceTokenizer(backend, vocab_size, end, identity.hexdigest())


def _from_file(file: Path, spec: str | Path) -> tuple[tokenizers.Tokenizer, int | None]:
    try:
        import tokenizers
    except ImportError as error:
        raise _problem(spec, f"reading {file} needs the tokenizers library: {INSTALL}") from error
    try:
        backend = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises bare Exception
        raise _problem(spec, f"{file} can't be read as a tokenizer: {error}") from error
    return backend, _end_of_document(file.parent, backend)


def _end_of_document(directory: Path, backend: tokenizers.Tokenizer) -> int | None:
    """The end-of-sequence token that the files beside tokenizer.json name, else the separator (BERT has only that)."""
    named = [_read(directory / name) for name in ("tokenizer_config.json", "special_tokens_map.json")]
    for role in ("eos_token", "sep_token"):
        for settings in named:
            token: Any = settings.get(role)
            content = cast("dict[str, Any]", token).get("content") if isinstance(token, dict) else token
            if isinstance(content, str) and (found := backend.token_to_id(content)) is not None:
                return found
        identifiers: Any = _read(directory / "config.json").get(f"{role}_id")
        for identifier in cast("list[Any]", identifiers) if isinstance(identifiers, list) else [identifiers]:
            if isinstance(identifier, int):
                return identifier
    return None


def _read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text("utf-8")) if file.exists() else {}


def _from_transformers(directory: Path, spec: str | Path) -> tuple[tokenizers.Tokenizer, int | None]:
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
    end = loaded.eos_token_id if loaded.eos_token_id is not None else loaded.sep_token_id
    return cast("tokenizers.Tokenizer", backend), cast("int | None", end)


def _problem(spec: str | Path, remedy: str) -> ConfigError:
    return ConfigError([Problem(FIELD, str(spec), remedy)], where="the tokenizer")
