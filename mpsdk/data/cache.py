"""Tokenise once: a data source becomes a folder of token ids that every process maps into memory.

The folder's name is a digest of the content, the tokenizer and the format, so that a changed corpus or tokenizer is
never mistaken for the one prepared before. It is written beside its final place and renamed when it is whole and on
disk: a reader sees all of it or none, and of several that prepare the same data at once, the first to finish wins.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mpsdk.data.dataset import FORMAT, HEADER_FILE, TOKENS_FILE, VERSION, Dataset, Header, Part
from mpsdk.data.faults import Faults
from mpsdk.data.pieces import Piece
from mpsdk.data.sources import Source, open_source
from mpsdk.data.tokenizer import Tokenizer
from mpsdk.errors import DataError

log = logging.getLogger(__name__)

BATCH = 1 << 20
"""Characters (or token ids) encoded at once; with the sources' pieces, it bounds the memory that preparing takes."""
ABANDONED_AFTER = 24 * 3600.0
"""Seconds without a write after which an unfinished folder is taken for a dead process's and removed."""


def prepare(
    source: object,
    *,
    tokenizer: Tokenizer,
    sequence_length: int,
    cache_directory: str | Path,
    part: Part = "train",
    validation_fraction: float = 0.0,
    text_column: str = "text",
) -> Dataset:
    """Tokenise `source`, unless that was done before, and open it.

    Args:
        source: what `mpsdk.data.sources` lists, files or data in memory.
        sequence_length: tokens of a sample. One tokenised corpus serves every length.
        part: with a `validation_fraction`, which part to open: the samples before the held-out tail, or that tail.
        validation_fraction: the share of samples at the end that is held out of training; 0 holds out none.
        text_column: the column of a table that has the text.

    Raises DataError with every bad file and line when the data can't be used, and when they are too short.
    """
    opened = open_source(source, vocab_size=tokenizer.vocab_size, text_column=text_column)
    content = opened.digest()
    directory = Path(cache_directory) / key_of([FORMAT, VERSION, content, tokenizer.fingerprint])

    def fill(folder: Path) -> str:
        header = _write_tokens(opened, content, tokenizer, folder / TOKENS_FILE)
        if opened.digest() != content:
            raise changed(opened.name)
        return header.to_json()

    if not directory.exists():
        write_once(directory, opened.name, fill)
    return Dataset.open(
        directory, sequence_length, part=part, validation_fraction=validation_fraction, name=opened.name
    )


def key_of(identity: list[object]) -> str:
    """The name of a prepared folder: equal for what would be prepared equally."""
    return hashlib.blake2b(json.dumps(identity).encode(), digest_size=16).hexdigest()


def changed(name: str) -> DataError:
    return DataError(f"{name} changed while it was being read; run again when it is complete")


def write_once(directory: Path, name: str, fill: Callable[[Path], str]) -> None:
    """Make `directory`, whole or not at all, of what `fill` writes into a folder and of the header that it returns.

    Raises DataError when that can't be written; `name` is of the data, for messages.
    """
    unfinished = directory.with_name(f"{directory.name}.tmp-{uuid.uuid4().hex[:12]}")
    started = time.monotonic()
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(directory.parent)
        unfinished.mkdir()
        header = fill(unfinished)
        with (unfinished / HEADER_FILE).open("x", encoding="utf-8") as file:
            file.write(header)
            file.flush()
            os.fsync(file.fileno())
        _commit(unfinished, directory)
    except OSError as error:
        raise DataError(f"{name} can't be tokenised into {directory.parent}: {error}") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)  # nothing is there any more once it is committed
    log.info("tokenised %s in %.1f s", name, time.monotonic() - started)


def dtype_of(tokenizer: Tokenizer) -> Literal["<u2", "<u4"]:
    """The smallest integers that hold its ids."""
    return "<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4"


def _write_tokens(source: Source, content: str, tokenizer: Tokenizer, path: Path) -> Header:
    dtype = dtype_of(tokenizer)
    tokens = 0
    with path.open("xb") as file:
        for ids in _encoded(source, tokenizer):
            file.write(ids.astype(dtype).tobytes())
            tokens += ids.size
        file.flush()
        os.fsync(file.fileno())
    return Header(
        dtype, tokens, tokenizer.vocab_size, tokenizer.end_of_document, content, tokenizer.fingerprint
    )


def _encoded(source: Source, tokenizer: Tokenizer) -> Iterator[NDArray[Any]]:
    """The token ids of the whole source, every document ended once. Raises DataError with all that is wrong with it."""
    faults = Faults(source.name)
    end = np.array([tokenizer.end_of_document])
    for batch in _batches(source.pieces(faults)):
        if faults:
            continue  # only read on, to find what else is wrong
        texts = iter(
            tokenizer.encode_many([piece.content for piece in batch if isinstance(piece.content, str)])
        )
        for piece in batch:
            ids = next(texts) if isinstance(piece.content, str) else piece.content
            yield ids
            if piece.ends_document and not (ids.size and ids[-1] == tokenizer.end_of_document):
                yield end
    faults.raise_if_any()


def _batches(pieces: Iterator[Piece]) -> Iterator[list[Piece]]:
    batch: list[Piece] = []
    size = 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece.content) + 1
        if size >= BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _commit(unfinished: Path, directory: Path) -> None:
    _sync(unfinished)
    try:
        unfinished.rename(directory)
    except OSError:
        if not directory.exists():
            raise
        log.info("%s was prepared by another process meanwhile", directory)
    _sync(directory.parent)


def _sync(directory: Path) -> None:
    """Make the names in `directory` durable."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove_abandoned(cache_directory: Path) -> None:
    for folder in cache_directory.glob(f"{'?' * 32}.tmp-{'?' * 12}"):
        with contextlib.suppress(OSError):  # its writer may commit it at this moment
            last_write = max(path.stat().st_mtime for path in (folder, *folder.iterdir()))
            if time.time() - last_write > ABANDONED_AFTER:
                shutil.rmtree(folder)
                log.warning("removed %s, which a process left unfinished", folder)
