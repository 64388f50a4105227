"""Verified access to one checkpoint's files. An error here says what is wrong, and leaves which checkpoint to the caller."""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

from mpsdk.checkpoint.container import Span, decode_header
from mpsdk.checkpoint.manifest import LARGEST_MANIFEST, Chunk, Manifest
from mpsdk.checkpoint.storage import MANIFEST_FILE, Storage
from mpsdk.errors import CheckpointError


def read_manifest(storage: Storage, directory: str) -> Manifest:
    """The manifest of the checkpoint in `directory`, verified against its own digest."""
    entry = storage.entries(directory).get(MANIFEST_FILE)
    if entry is None:
        raise CheckpointError(f"there is no {MANIFEST_FILE}, so this is not a complete checkpoint")
    if entry.kind != "file" or entry.bytes > LARGEST_MANIFEST:
        raise CheckpointError(f"{MANIFEST_FILE} is not a file of at most {LARGEST_MANIFEST} bytes")
    try:
        data = storage.read(storage.join(directory, MANIFEST_FILE), 0, entry.bytes)
    except OSError as error:
        raise CheckpointError(f"{MANIFEST_FILE} cannot be read: {error}") from error
    try:
        return Manifest.from_bytes(data)
    except CheckpointError as error:
        raise CheckpointError(f"{MANIFEST_FILE}: {error}") from None


class Files:
    """The ranks' files of one checkpoint. Nothing that they hold is used before its digest was right."""

    def __init__(self, storage: Storage, directory: str, manifest: Manifest) -> None:
        self.storage = storage
        self.directory = directory
        self.manifest = manifest
        self._headers: dict[str, dict[str, Span]] = {}

    def header(self, name: str) -> dict[str, Span]:
        """Where the tensors of file `name` lie. The length of the file and its header are verified the first time."""
        if name in self._headers:
            return self._headers[name]
        stated = self.manifest.files[name]
        entry = self.storage.entries(self.directory).get(name)
        if entry is None:
            raise CheckpointError(f"{name} is missing")
        if entry.kind != "file":
            raise CheckpointError(f"{name} is a {entry.kind}, not a file (links are not followed)")
        if entry.bytes != stated.bytes:
            how = "truncated" if entry.bytes < stated.bytes else "lengthened"
            raise CheckpointError(f"{name} is {how}: it has {entry.bytes} bytes instead of {stated.bytes}")
        data = self._read(name, 0, stated.header_bytes)
        if hashlib.sha256(data).hexdigest() != stated.header_sha256:
            raise CheckpointError(f"{name}: the header does not have the digest that the manifest states")
        try:
            spans = decode_header(data)
        except ValueError as error:
            raise CheckpointError(f"{name}: {error}") from None
        end = max((span.end for span in spans.values()), default=stated.header_bytes)
        if end != stated.bytes:
            raise CheckpointError(f"{name}: its tensors end at byte {end}, the file at {stated.bytes}")
        self._headers[name] = spans
        return spans

    def load(self, chunk: Chunk) -> NDArray[np.float32]:
        """The values of a chunk, read-only, once their digest is found right."""
        span = self.header(chunk.file).get(chunk.key)
        if span is None or span.shape != chunk.shape:
            raise CheckpointError(f"{chunk.file} holds no {chunk.key} of shape {list(chunk.shape)}")
        data = self._read(chunk.file, span.start, span.end - span.start)
        if hashlib.sha256(data).hexdigest() != chunk.sha256:
            raise CheckpointError(
                f"{chunk.file}: {chunk.key} at {chunk.box} is damaged (bytes {span.start} to {span.end} do not have the "
                "digest that the manifest states)"
            )
        return np.frombuffer(data, "<f4").reshape(chunk.shape)

    def _read(self, name: str, start: int, length: int) -> bytes:
        try:
            data = self.storage.read(self.storage.join(self.directory, name), start, length)
        except OSError as error:
            raise CheckpointError(f"{name} cannot be read: {error}") from error
        if len(data) != length:
            raise CheckpointError(f"{name} ends before byte {start + length}")
        return data
