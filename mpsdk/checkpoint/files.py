"""Verified access to one checkpoint's files. An error here says what is wrong, and leaves which checkpoint to the caller."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from mpsdk.checkpoint.container import Span, decode_header
from mpsdk.checkpoint.manifest import LARGEST_MANIFEST, Chunk, Manifest
from mpsdk.checkpoint.names import step_of
from mpsdk.checkpoint.problems import os_errors
from mpsdk.checkpoint.storage import MANIFEST_FILE, Entry, Storage
from mpsdk.errors import CheckpointError


def read_manifest(storage: Storage, directory: str) -> Manifest:
    """The manifest of the checkpoint in `directory`, verified against its own digest."""
    path = storage.join(directory, MANIFEST_FILE)
    with os_errors(f"{MANIFEST_FILE} cannot be read"):
        entry = storage.entry(path)
        if entry is None:
            raise CheckpointError(f"there is no {MANIFEST_FILE} in it, so it is not a complete checkpoint")
        if entry.kind != "file" or entry.bytes > LARGEST_MANIFEST:
            raise CheckpointError(f"{MANIFEST_FILE} is not a file of at most {LARGEST_MANIFEST} bytes")
        data = storage.read(path, 0, entry.bytes)
    try:
        manifest = Manifest.from_bytes(bytes(data))
    except CheckpointError as error:
        raise CheckpointError(f"{MANIFEST_FILE}: {error}") from None
    named = step_of(storage.name(directory))
    if named not in (None, manifest.step):
        raise CheckpointError(
            f"{MANIFEST_FILE} is of step {manifest.step}, the directory is named for step {named}"
        )
    return manifest


class Files:
    """The ranks' files of one checkpoint. Nothing that they hold is used before its digest was right."""

    def __init__(
        self,
        storage: Storage,
        directory: str,
        manifest: Manifest,
        entries: Mapping[str, Entry] | None = None,
    ) -> None:
        """With `entries`, the directory's listing is taken from there instead of asking file by file."""
        self.storage = storage
        self.directory = directory
        self.manifest = manifest
        self._entries = entries
        self._headers: dict[str, dict[str, Span]] = {}

    def header(self, name: str) -> dict[str, Span]:
        """Where the tensors of file `name` lie. The length of the file and its header are verified the first time."""
        if name in self._headers:
            return self._headers[name]
        stated = self.manifest.files[name]
        if self._entries is None:
            with os_errors(f"{name} cannot be read"):
                entry = self.storage.entry(self.storage.join(self.directory, name))
        else:
            entry = self._entries.get(name)
        if entry is None:
            raise CheckpointError(f"{name} is missing")
        if entry.kind != "file":
            raise CheckpointError(f"{name} is not a file (links are not followed)")
        if entry.bytes != stated.bytes:
            how = "truncated" if entry.bytes < stated.bytes else "lengthened"
            raise CheckpointError(f"{name} is {how}: it has {entry.bytes} bytes instead of {stated.bytes}")
        data = self._read(name, 0, stated.header_bytes)
        if hashlib.sha256(data).hexdigest() != stated.header_sha256:
            raise CheckpointError(f"{name}: the header does not have the digest that the manifest states")
        try:
            spans = decode_header(bytes(data))
        except ValueError as error:
            raise CheckpointError(f"{name}: {error}") from None
        end = max((span.end for span in spans.values()), default=stated.header_bytes)
        if end != stated.bytes:
            raise CheckpointError(f"{name}: its tensors end at byte {end}, the file at {stated.bytes}")
        self._headers[name] = spans
        return spans

    def span(self, chunk: Chunk) -> Span:
        """Where a chunk lies in its file."""
        span = self.header(chunk.file).get(chunk.key)
        if span is None or span.shape != chunk.shape:
            raise CheckpointError(f"{chunk.file} holds no {chunk.key} of shape {list(chunk.shape)}")
        return span

    def load(self, chunk: Chunk) -> NDArray[np.float32]:
        """The values of a chunk, read-only, once their digest is found right."""
        span = self.span(chunk)
        data = self._read(chunk.file, span.start, span.end - span.start)
        if hashlib.sha256(data).hexdigest() != chunk.sha256:
            raise CheckpointError(
                f"{chunk.file}: {chunk.key} at {chunk.box} is damaged (bytes {span.start} to {span.end} do not have the "
                "digest that the manifest states)"
            )
        values = np.frombuffer(data, "<f4").reshape(chunk.shape)
        values.flags.writeable = False
        return values

    def _read(self, name: str, start: int, length: int) -> bytes | bytearray:
        with os_errors(f"{name} cannot be read"):
            data = self.storage.read(self.storage.join(self.directory, name), start, length)
        if len(data) != length:
            raise CheckpointError(f"{name} ends before byte {start + length}")
        return data
