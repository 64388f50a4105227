"""Committing a checkpoint: what all ranks wrote becomes one checkpoint, or nothing changes."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping, Sequence

from pydantic import JsonValue, ValidationError

from mpsdk.checkpoint.manifest import (
    Chunk,
    Manifest,
    Meta,
    Part,
    Scalars,
    StoredFile,
    StoredTensor,
    canonical_json,
    validation_problems,
)
from mpsdk.checkpoint.names import RANK_FILE_PATTERN, REPLACED, newest_in_words, step_of
from mpsdk.checkpoint.problems import refuse
from mpsdk.checkpoint.storage import MANIFEST_FILE, Location, Storage, locate
from mpsdk.errors import CheckpointError

logger = logging.getLogger(__name__)


def commit(
    tmp: Location, final: Location, parts: Sequence[Mapping[str, JsonValue]], meta: Mapping[str, object]
) -> Manifest:
    """Turn what all ranks wrote into `tmp` into the checkpoint `final`: check it, write the manifest, rename.

    An older checkpoint of the same name is replaced, and stays readable until the new one is.

    Args:
        tmp: `step_directory(root, step, generation)`.
        final: `step_directory(root, step)`; beside `tmp`.
        parts: what `write_rank` returned on every rank.
        meta: the fields of `mpsdk.checkpoint.manifest.Meta`: step, samples_consumed, framework, plan (JSON data),
            plan_hash; and if need be seeds, naming, tied. Scalars come with the parts.

    Raises:
        CheckpointError: lists every tensor that has holes or is written twice, every difference between ranks, every
            file that is missing or has another length. `tmp` is left for inspection and nothing else has changed.
    """
    storage, source = locate(tmp, follow=False)
    target = locate(final, follow=False)[1]
    problems: list[str] = []
    read = _read_parts(parts, problems)
    described = _read_meta(meta, problems)
    named = step_of(storage.name(target))
    if described and named not in (None, described.step):
        problems.append(f"the directory is named for step {named}, and meta has step {described.step}")
    if storage.parent(source) != storage.parent(target) or source == target:
        problems.append(f"{source} must lie beside {target}, under another name")
    tensors = _join(read, problems)
    files = {name: file for part in read for name, file in part.files.items()}
    manifest = None
    if described and not problems:
        manifest = _manifest(described, tensors, files, read[0].scalars, problems)
    try:
        problems += _differences(storage, source, files)
        if problems or not manifest:
            raise refuse(
                f"the checkpoint {storage.address(target)} cannot be committed",
                problems,
                f"Nothing was committed; {newest_in_words(storage, storage.parent(source))}",
            )
        with storage.create(storage.join(source, MANIFEST_FILE)) as stream:
            stream.write(manifest.to_bytes())
        _put(storage, source, target)
    except OSError as error:
        raise CheckpointError(
            f"the checkpoint {storage.address(target)} could not be committed: {error}; "
            f"{newest_in_words(storage, storage.parent(source))}"
        ) from error
    logger.info("checkpoint of step %d committed: %s", manifest.step, storage.address(target))
    return manifest


def _read_parts(parts: Sequence[Mapping[str, JsonValue]], problems: list[str]) -> list[Part]:
    """The parts that can be read; a problem for each that can't."""
    read: list[Part] = []
    for number, part in enumerate(parts):
        try:
            read.append(Part.model_validate_json(json.dumps(part)))
        except ValidationError as error:
            problems += [f"part {number}: {problem}" for problem in validation_problems(error)]
    if not parts:
        problems.append("no rank's part was given")
    return read


def _read_meta(meta: Mapping[str, object], problems: list[str]) -> Meta | None:
    try:
        described = Meta.model_validate(dict(meta))
        canonical_json(described.plan)
    except ValidationError as error:
        problems += [f"meta: {problem}" for problem in validation_problems(error)]
        return None
    except ValueError as error:
        problems.append(f"meta: plan: {error}")
        return None
    return described


def _join(parts: Sequence[Part], problems: list[str]) -> dict[str, StoredTensor]:
    """The tensors of all ranks, each known to be covered exactly once where no problem is added."""
    shapes: dict[str, tuple[int, ...]] = {}
    chunks: dict[str, list[Chunk]] = {}
    unlike: set[str] = set()
    ranks: set[int] = set()
    for part in parts:
        if part.rank in ranks:
            problems.append(f"rank {part.rank} was handed in twice")
        ranks.add(part.rank)
        if part.scalars != parts[0].scalars:
            problems.append(
                f"scalars differ: {parts[0].scalars} on rank {parts[0].rank}, {part.scalars} on rank {part.rank}"
            )
        for key, tensor in part.tensors.items():
            if shapes.setdefault(key, tensor.shape) != tensor.shape:
                unlike.add(key)
                problems.append(
                    f"{key}: global shape {list(tensor.shape)} on rank {part.rank}, {list(shapes[key])} on another"
                )
            chunks.setdefault(key, []).extend(tensor.chunks)
    tensors: dict[str, StoredTensor] = {}
    for key, shape in shapes.items():
        tensors[key] = StoredTensor(dtype="float32", shape=shape, chunks=tuple(chunks[key]))
        if key not in unlike:
            problems += tensors[key].tiling_problems(key)
    return tensors


def _manifest(
    meta: Meta,
    tensors: dict[str, StoredTensor],
    files: dict[str, StoredFile],
    scalars: Scalars,
    problems: list[str],
) -> Manifest | None:
    try:
        return Manifest(**meta.model_dump(), tensors=tensors, files=files, scalars=scalars)
    except ValidationError as error:
        problems += validation_problems(error)
        return None


def _differences(storage: Storage, directory: str, files: Mapping[str, StoredFile]) -> list[str]:
    """Whether the ranks' files, and no others, lie in the directory with the lengths that were written."""
    entries = storage.entries(directory)
    problems = [
        f"{name} is not one of the ranks' files"
        for name in sorted(entries.keys() - files.keys() - {MANIFEST_FILE})
    ]
    for name, file in files.items():
        if name not in entries:
            problems.append(f"{name} is missing")
        elif entries[name].kind != "file" or entries[name].bytes != file.bytes:
            problems.append(f"{name} has {entries[name].bytes} bytes, and {file.bytes} were written")
    return problems


def _put(storage: Storage, source: str, target: str) -> None:
    """Move the complete `source` to `target`; at every moment the old or the new checkpoint can be found."""
    aside = target + REPLACED
    entry = storage.entry(target)
    if entry and entry.kind != "directory":
        raise FileExistsError(f"{target} is a link or a file: move it away")
    old = storage.entries(target)
    if MANIFEST_FILE in old:
        if storage.entries(aside):
            storage.remove_directory(aside)
        storage.move(target, aside)
    elif foreign := sorted(name for name in old if not re.fullmatch(RANK_FILE_PATTERN, name)):
        raise FileExistsError(f"{target} is not a checkpoint, it holds {foreign[0]!r}: move it away")
    elif old:
        storage.remove_directory(target)  # what an interrupted move to a store without rename left
    storage.move(source, target)
    if MANIFEST_FILE in storage.entries(aside):
        try:
            storage.remove_directory(aside)
        except OSError as error:  # the new checkpoint is in its place all the same
            logger.warning(
                "the replaced checkpoint %s could not be removed: %s", storage.address(aside), error
            )
