"""Writing a checkpoint: each rank its own file into a temporary directory, then one rank commits.

    tmp = step_directory(root, step, generation)
    part = write_rank(tmp, rank, state)                      # on every rank, side by side
    commit(tmp, step_directory(root, step), parts, meta)     # on one rank, with the parts of all

Until `commit` returns nothing under `root` has changed for a reader. Whatever moment a save is interrupted at, the
checkpoints that were complete before it still are.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import IO

import numpy as np
from numpy.typing import NDArray
from pydantic import JsonValue, ValidationError

from mpsdk.backend import RankState, Shard
from mpsdk.checkpoint.container import encode_header
from mpsdk.checkpoint.manifest import (
    FORMAT,
    ITEM_BYTES,
    Chunk,
    Part,
    StoredFile,
    StoredTensor,
    validation_problems,
)
from mpsdk.checkpoint.names import newest_in_words, rank_file, tensor_key_problem
from mpsdk.checkpoint.problems import refuse
from mpsdk.checkpoint.storage import Location, Storage, locate
from mpsdk.checkpoint.tiling import Box, split
from mpsdk.errors import CheckpointError

CHUNK_BYTES = 16 << 20


@dataclass(frozen=True)
class _Piece:
    """A shard and the chunks that it is written as; the boxes are counted from the shard's own corner."""

    shard: Shard
    tensor: str
    keys: tuple[str, ...]
    boxes: tuple[Box, ...]


def write_rank(directory: Location, rank: int, state: RankState) -> dict[str, JsonValue]:
    """Write what `rank` contributes into `directory`, and say what was written, for `commit`.

    Memory: one shard at a time, as its `read` gives it. The file is on disk when this returns.

    Args:
        directory: `step_directory(root, step, generation)`, the same on all ranks; made if it is not there.
        rank: names the file.
        state: the shards, each rank's own; a shard without elements writes nothing.

    Returns:
        JSON-able; the `parts` of `commit` are those of all ranks.

    Raises:
        CheckpointError: a shard does not fit its tensor, or the directory cannot be written.
    """
    storage, path = locate(directory, follow=False)
    try:
        part = Part(rank=rank, scalars=dict(state.scalars), tensors={}, files={})
    except ValidationError as error:
        raise refuse(f"rank {rank}'s state cannot be written", validation_problems(error)) from None
    pieces = _plan(state.shards)
    shapes = {key: box.shape for piece in pieces for key, box in zip(piece.keys, piece.boxes, strict=True)}
    header = encode_header(shapes, {"format": FORMAT, "rank": str(rank)})
    file = rank_file(rank)
    try:
        _make_directory(storage, path)
        chunks = _write(storage, storage.join(path, file), header, pieces) if shapes else {}
    except OSError as error:
        raise CheckpointError(
            f"rank {rank} could not write {file} in {storage.address(path)}: {error}. Nothing was committed; "
            f"{newest_in_words(storage, storage.parent(path))}"
        ) from error
    tensors = {
        piece.tensor: StoredTensor(
            dtype="float32",
            shape=tuple(piece.shard.global_shape),
            chunks=tuple(chunks.get(piece.tensor, ())),
        )
        for piece in pieces
    }
    stored = StoredFile(
        bytes=len(header) + ITEM_BYTES * sum(math.prod(shape) for shape in shapes.values()),
        header_bytes=len(header),
        header_sha256=hashlib.sha256(header).hexdigest(),
    )
    part = part.model_copy(update={"tensors": tensors, "files": {file: stored} if shapes else {}})
    return part.model_dump(mode="json")


def _plan(shards: Iterable[Shard]) -> list[_Piece]:
    """The chunks of every shard. Raises CheckpointError that lists all shards that cannot be written."""
    problems: list[str] = []
    pieces: list[_Piece] = []
    chunks_before: dict[str, int] = {}
    shape_of: dict[str, tuple[int, ...]] = {}
    for shard in shards:
        tensor, shape = f"{shard.slot}/{shard.name}", tuple(shard.global_shape)
        if problem := tensor_key_problem(tensor):
            problems.append(f"{tensor!r}: {problem}")
        elif not Box(shard.offset, shard.shape).fits(shape):
            problems.append(
                f"{tensor}: a shard of shape {list(shard.shape)} at {list(shard.offset)} is outside the global shape "
                f"{list(shape)}"
            )
        elif shape_of.setdefault(tensor, shape) != shape:
            problems.append(
                f"{tensor}: global shape {list(shape)} here, {list(shape_of[tensor])} in an earlier shard"
            )
        else:
            boxes = tuple(split(tuple(shard.shape), CHUNK_BYTES // ITEM_BYTES))
            first = chunks_before.get(tensor, 0)
            chunks_before[tensor] = first + len(boxes)
            keys = tuple(f"{tensor}/{number}" for number in range(first, first + len(boxes)))
            pieces.append(_Piece(shard, tensor, keys, boxes))
    if problems:
        raise refuse("these shards cannot be written", problems)
    return pieces


def _write(storage: Storage, path: str, header: bytes, pieces: Sequence[_Piece]) -> dict[str, list[Chunk]]:
    """Write a rank's file front to back; gives the chunks of every tensor."""
    chunks: dict[str, list[Chunk]] = {}
    with storage.create(path) as stream, ThreadPoolExecutor(1) as writing:
        stream.write(header)
        for piece in pieces:
            chunks.setdefault(piece.tensor, []).extend(
                _write_piece(stream, writing, storage.name(path), piece)
            )
    return chunks


def _write_piece(stream: IO[bytes], writing: ThreadPoolExecutor, file: str, piece: _Piece) -> Iterator[Chunk]:
    """Write a shard chunk by chunk, each hashed while it goes to the file."""
    shard = piece.shard
    if not piece.boxes:
        return
    values = shard.read()
    if values.shape != tuple(shard.shape) or values.dtype != np.float32:
        got = f"{values.dtype} of shape {list(values.shape)}"
        raise refuse(
            "a shard cannot be written",
            [f"{piece.tensor}: `read` gave {got}, and the shard is float32 of shape {list(shard.shape)}"],
        )
    flat: NDArray[np.float32] = np.ascontiguousarray(values, dtype="<f4").reshape(-1)
    position = 0
    for key, box in zip(piece.keys, piece.boxes, strict=True):
        data = flat[position : position + box.elements].data.cast("B")
        position += box.elements
        written: Future[int] = writing.submit(stream.write, data)
        digest = hashlib.sha256(data).hexdigest()
        written.result()
        offset = tuple(base + start for base, start in zip(shard.offset, box.offset, strict=True))
        yield Chunk(file=file, key=key, offset=offset, shape=box.shape, sha256=digest)


def _make_directory(storage: Storage, path: str) -> None:
    storage.make_directory(path)
    entry = storage.entry(path)
    if entry and entry.kind != "directory":
        raise NotADirectoryError(f"{path} is a link or a file, not a directory")
