"""Full verification of a checkpoint, and advice on what to use instead of a damaged one."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

from mpsdk.checkpoint.files import Files, read_manifest
from mpsdk.checkpoint.manifest import Chunk, Manifest
from mpsdk.checkpoint.names import complete_in, step_of
from mpsdk.checkpoint.problems import os_errors
from mpsdk.checkpoint.storage import MANIFEST_FILE, Storage
from mpsdk.errors import CheckpointError

THREADS = 8  # at most; each holds one chunk, and hashing releases the interpreter's lock


def find_damage(
    storage: Storage, directory: str, *, payload: bool = True
) -> tuple[Manifest | None, list[str]]:
    """Everything that is wrong with the checkpoint in `directory`, and its manifest where that is sound.

    With `payload=False` the tensors' bytes are not read: manifest, file lengths, headers and tiling are checked.
    """
    try:
        manifest = read_manifest(storage, directory)
        with os_errors("the directory cannot be listed"):
            entries = storage.entries(directory)
    except CheckpointError as error:
        return None, [str(error)]
    problems = [
        f"{name} does not belong to the checkpoint: move it away"
        for name in sorted(entries.keys() - manifest.files.keys() - {MANIFEST_FILE})
    ]
    chunks_of: dict[str, list[Chunk]] = {name: [] for name in manifest.files}
    for key, tensor in manifest.tensors.items():
        problems += tensor.tiling_problems(key)
        for chunk in tensor.chunks:
            chunks_of[chunk.file].append(chunk)
    files = Files(storage, directory, manifest, entries)
    readable: list[Chunk] = []
    for name, chunks in chunks_of.items():
        try:
            held = files.header(name).keys()
        except CheckpointError as error:
            problems.append(str(error))
            continue
        stated = {chunk.key for chunk in chunks}
        problems += [f"{name}: {key} is not in the manifest" for key in held if key not in stated]
        for chunk in chunks:
            try:
                files.span(chunk)
                readable.append(chunk)
            except CheckpointError as error:
                problems.append(str(error))
    if payload:
        problems += _damaged_chunks(files, readable)
    return manifest, problems


def _damaged_chunks(files: Files, chunks: list[Chunk]) -> list[str]:
    def problem(chunk: Chunk) -> str | None:
        try:
            files.load(chunk)
        except CheckpointError as error:
            return str(error)
        return None

    with ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1)) as pool:
        return [found for found in pool.map(problem, chunks) if found]


def advice(storage: Storage, directory: str, *, payload: bool = True) -> str:
    """Which older checkpoint beside `directory` to use instead; it is verified, its tensors' bytes only with `payload`."""
    parent = storage.parent(directory)
    place = storage.address(parent)
    try:
        inside = complete_in(storage, directory)
        names = complete_in(storage, parent)
    except OSError as error:
        return f"Other checkpoints in {place} cannot be listed: {error}"
    if inside:
        return f"It holds checkpoints; the newest of them is {storage.address(storage.join(directory, inside[0]))}."
    own = step_of(storage.name(directory))
    older = [
        storage.join(parent, name)
        for name in names
        if name != storage.name(directory) and (own is None or (step_of(name) or 0) <= own)
    ]
    for path in older:
        if not find_damage(storage, path, payload=payload)[1]:
            sure = "is intact" if payload else "looks intact (its tensors were not read)"
            return f"The older checkpoint {storage.address(path)} {sure}: use that one."
    return (
        f"No older checkpoint in {place} is intact." if older else f"There is no older checkpoint in {place}."
    )
