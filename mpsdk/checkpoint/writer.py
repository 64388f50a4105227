"""Writing a checkpoint: each rank its own file into a temporary directory, then one rank commits.

    tmp = step_directory(root, step, generation)
    part = write_rank(tmp, rank, state)                             # on every rank, side by side
    commit(tmp, step_directory(root, step), parts, meta)            # on one rank, with the parts of all

Until `commit` returns nothing under `root` has changed for a reader. Whatever moment a save is interrupted at, the
checkpoints that were complete before it still are.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import re
from collections.abc import Iterator, Mapping, Sequence
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
    Manifest,
    Meta,
    Part,
    Scalars,
    StoredFile,
    StoredTensor,
    validation_problems,
)
from mpsdk.checkpoint.names import (
    RANK_FILE_PATTERN,
    REPLACED,
    complete_in,
    rank_file,
    step_of,
    tensor_key_problem,
)
from mpsdk.checkpoint.problems import refuse
from mpsdk.checkpoint.storage import MANIFEST_FILE, Location, Storage, locate
from mpsdk.checkpoint.tiling import Box, split
from mpsdk.errors import CheckpointError

CHUNK_BYTES = 16 << 20

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Piece:
    """A shard and the chunks that it is written as, boxes counted from the shard's own corner."""

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
    shards = list(state.shards)
    pieces = list(_pieces(shards))
    file = rank_file(rank)
    shapes = {key: box.shape for piece in pieces for key, box in zip(piece.keys, piece.boxes, strict=True)}
    header = encode_header(shapes, {"format": FORMAT, "rank": str(rank)})
    tensors: dict[str, list[Chunk]] = {piece.tensor: [] for piece in pieces}
    try:
        _make_directory(storage, path)
        if shapes:
            with storage.create(storage.join(path, file)) as stream, ThreadPoolExecutor(1) as writing:
                stream.write(header)
                for piece in pieces:
                    tensors[piece.tensor] += _write_piece(stream, writing, file, piece)
    except OSError as error:
        raise CheckpointError(
            f"rank {rank} could not write {file} in {storage.address(path)}: {error}. "
            f"Nothing was committed; {_last(storage, path)}"
        ) from error
    size = len(header) + ITEM_BYTES * sum(math.prod(shape) for shape in shapes.values())
    part = Part(
        rank=rank,
        tensors={
            piece.tensor: StoredTensor(
                dtype="float32", shape=tuple(piece.shard.global_shape), chunks=tuple(tensors[piece.tensor])
            )
            for piece in pieces
        },
        files={
            file: StoredFile(
                bytes=size, header_bytes=len(header), header_sha256=hashlib.sha256(header).hexdigest()
            )
        }
        if shapes
        else {},
        scalars=dict(state.scalars),
    )
    return part.model_dump(mode="json")


def _pieces(shards: Sequence[Shard]) -> Iterator[_Piece]:
    """Plan the chunks of every shard. Raises CheckpointError that lists all shards that cannot be written."""
    problems: list[str] = []
    count: dict[str, int] = {}
    shape_of: dict[str, tuple[int, ...]] = {}
    pieces: list[_Piece] = []
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
            boxes = tuple(split(shard.shape, CHUNK_BYTES // ITEM_BYTES))
            first = count.get(tensor, 0)
            count[tensor] = first + len(boxes)
            keys = tuple(f"{tensor}/{number}" for number in range(first, first + len(boxes)))
            pieces.append(_Piece(shard, tensor, keys, boxes))
    if problems:
        raise refuse("these shards cannot be written", problems)
    yield from pieces


def _write_piece(stream: IO[bytes], writing: ThreadPoolExecutor, file: str, piece: _Piece) -> Iterator[Chunk]:
    """Write a shard chunk by chunk, hashing one while the one before goes to the file."""
    shard = piece.shard
    if not piece.boxes:
        return
    values = shard.read()
    if values.shape != shard.shape or values.dtype != np.float32:
        raise refuse(
            "a shard cannot be written",
            [
                f"{piece.tensor}: `read` gave {values.dtype} of shape {list(values.shape)}, and the shard is float32 of "
                f"shape {list(shard.shape)}"
            ],
        )
    flat: NDArray[np.float32] = np.ascontiguousarray(values, dtype="<f4").reshape(-1)
    position = 0
    pending: Future[int] | None = None
    for key, box in zip(piece.keys, piece.boxes, strict=True):
        data = flat[position : position + box.elements].data.cast("B")
        position += box.elements
        if pending:
            pending.result()
        pending = writing.submit(stream.write, data)
        yield Chunk(
            file=file,
            key=key,
            offset=tuple(base + start for base, start in zip(shard.offset, box.offset, strict=True)),
            shape=box.shape,
            sha256=hashlib.sha256(data).hexdigest(),
        )
    if pending:
        pending.result()


def commit(
    tmp: Location, final: Location, parts: Sequence[Mapping[str, JsonValue]], meta: Mapping[str, object]
) -> Manifest:
    """Turn what all ranks wrote into `tmp` into the checkpoint `final`: check it, write the manifest, rename.

    An older checkpoint of the same name is replaced, and stays readable until the new one is.

    Args:
        tmp: `step_directory(root, step, generation)`.
        final: `step_directory(root, step)`; beside `tmp`.
        parts: what `write_rank` returned on every rank.
        meta: the fields of `Meta`: step, samples_consumed, framework, plan, plan_hash, and if need be seeds, naming, tied.

    Raises:
        CheckpointError: lists every tensor that has holes or is written twice, every difference between ranks, every
            file that is missing or has another length. `tmp` is left for inspection and nothing else has changed.
    """
    storage, source = locate(tmp, follow=False)
    target = locate(final, follow=False)[1]
    manifest, problems = _assemble(parts, meta)
    if storage.parent(source) != storage.parent(target) or source == target:
        problems.append(f"{source} must lie beside {target}, under another name")
    named = step_of(target.rpartition("/")[2])
    if manifest and named not in (None, manifest.step):
        problems.append(f"the directory is named for step {named}, and meta has step {manifest.step}")
    try:
        if manifest:
            problems += _differences(storage, source, manifest)
        if not manifest or problems:
            raise refuse(
                f"the checkpoint {storage.address(target)} cannot be committed",
                problems,
                f"Nothing was committed; {_last(storage, source)}",
            )
        with storage.create(storage.join(source, MANIFEST_FILE)) as stream:
            stream.write(manifest.to_bytes())
        _put(storage, source, target)
    except OSError as error:
        raise CheckpointError(
            f"the checkpoint {storage.address(target)} could not be committed: {error}; {_last(storage, source)}"
        ) from error
    logger.info("checkpoint of step %d committed: %s", manifest.step, storage.address(target))
    return manifest


def _assemble(
    parts: Sequence[Mapping[str, JsonValue]], meta: Mapping[str, object]
) -> tuple[Manifest | None, list[str]]:
    """Join the parts. Gives the manifest if its fields could be read at all, and every problem found."""
    problems: list[str] = []
    read: list[Part] = []
    described: Meta | None = None
    for number, part in enumerate(parts):
        try:
            read.append(Part.model_validate_json(json.dumps(part)))
        except (ValidationError, TypeError) as error:
            problems.append(f"part {number}: {_text(error)}")
    try:
        described = Meta.model_validate(dict(meta))
        json.dumps(described.plan, allow_nan=False)
    except (ValidationError, ValueError, TypeError) as error:
        problems.append(f"meta: {_text(error)}")
    if not read:
        problems.append("no rank's part was given")
    if described is None or problems:
        return None, problems

    files: dict[str, StoredFile] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    chunks: dict[str, list[Chunk]] = {}
    scalars: Scalars = read[0].scalars
    for part in read:
        if twice := sorted(files.keys() & part.files.keys()):
            problems.append(f"rank {part.rank} was handed in twice: {', '.join(twice)}")
        files |= part.files
        if part.scalars != scalars:
            problems.append(
                f"scalars differ: {scalars} on rank {read[0].rank}, {part.scalars} on rank {part.rank}"
            )
        for key, tensor in part.tensors.items():
            if shapes.setdefault(key, tensor.shape) != tensor.shape:
                problems.append(
                    f"{key}: global shape {list(tensor.shape)} on rank {part.rank}, {list(shapes[key])} on another"
                )
            chunks.setdefault(key, []).extend(tensor.chunks)
    problems += [
        f"scalar {name!r} is {value}: only finite numbers can be saved"
        for name, value in scalars.items()
        if not math.isfinite(value)
    ]
    for name, owner in described.tied.items():
        if f"weight/{owner}" not in shapes or f"weight/{name}" in shapes:
            problems.append(f"{name} is tied to {owner}: only {owner} must be written")
    if problems:
        return None, problems
    tensors = {
        key: StoredTensor(dtype="float32", shape=shape, chunks=tuple(chunks[key]))
        for key, shape in shapes.items()
    }
    for key, tensor in tensors.items():
        problems += tensor.tiling_problems(key)
    return Manifest(**described.model_dump(), tensors=tensors, files=files, scalars=scalars), problems


def _differences(storage: Storage, directory: str, manifest: Manifest) -> list[str]:
    """Whether the ranks' files, and no others, lie in the directory with the lengths that were written."""
    entries = storage.entries(directory)
    problems = [
        f"{name} is not one of the ranks' files"
        for name in sorted(entries.keys() - manifest.files.keys() - {MANIFEST_FILE})
    ]
    for name, file in manifest.files.items():
        if name not in entries:
            problems.append(f"{name} is missing")
        elif entries[name].kind != "file" or entries[name].bytes != file.bytes:
            problems.append(f"{name} has {entries[name].bytes} bytes, and {file.bytes} were written")
    return problems


def _put(storage: Storage, source: str, target: str) -> None:
    """Move the complete `source` to `target`; at every moment the old or the new checkpoint can be found."""
    aside = target + REPLACED
    kind = _kind(storage, target)
    if kind not in (None, "directory"):
        raise FileExistsError(f"{target} is a link or a file: move it away")
    old = storage.entries(target)
    if MANIFEST_FILE in old:
        if storage.entries(aside):
            storage.remove_directory(aside)
        storage.move(target, aside)
    elif foreign := sorted(name for name in old if not re.match(RANK_FILE_PATTERN, name)):
        raise FileExistsError(f"{target} is not a checkpoint, it holds {foreign[0]!r}: move it away")
    elif old:
        storage.remove_directory(target)  # what an interrupted move to a store without rename left
    storage.move(source, target)
    if MANIFEST_FILE in storage.entries(aside):
        storage.remove_directory(aside)


def _make_directory(storage: Storage, path: str) -> None:
    storage.make_directory(path)
    if _kind(storage, path) not in (None, "directory"):
        raise NotADirectoryError(f"{path} is a link, not a directory")


def _kind(storage: Storage, path: str) -> str | None:
    """What `path` itself is, links not followed; None if there is nothing (some stores have no empty directories)."""
    parent = storage.parent(path)
    entry = storage.entries(parent).get(path[len(parent) :].lstrip("/"))
    return entry.kind if entry else None


def _last(storage: Storage, path: str) -> str:
    """What there is to go on with, in words."""
    names = complete_in(storage, storage.parent(path))
    return f"the newest complete checkpoint is still {names[0]}" if names else "there is no checkpoint yet"


def _text(error: Exception) -> str:
    return validation_problems(error) if isinstance(error, ValidationError) else str(error)
