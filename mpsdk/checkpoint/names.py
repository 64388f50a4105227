"""Names on disk: of checkpoint directories, of the files in them, of tensors. Everything else is refused."""

from __future__ import annotations

import os
import re

from mpsdk.checkpoint.problems import os_errors
from mpsdk.checkpoint.storage import MANIFEST_FILE, Location, Storage, is_remote, locate
from mpsdk.errors import CheckpointError

RANK_FILE_PATTERN = r"^rank-[0-9]{5,9}\.safetensors$"
SLOT_PATTERN = r"[a-z][a-z0-9_]{0,63}"
REPLACED = ".replaced"
TEMPORARY = ".tmp-"
LONGEST_TENSOR_NAME = 1024

_STEP = re.compile(r"step-([0-9]{8,18})(\.replaced)?")
_TEMPORARY = re.compile(r"step-[0-9]{8,18}(?:\.replaced)?\.tmp-([A-Za-z0-9_-]{1,64})")
_GENERATION = re.compile(r"[A-Za-z0-9_-]{1,64}")


def rank_file(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"


def step_directory(root: Location, step: int, generation: int | str | None = None) -> str:
    """`<root>/step-00000100`, or with a generation the directory that it is first written into.

    The generation tells apart the processes that tried to save this step: what one of them left behind half-written is
    never taken up by the next.
    """
    if step < 0:
        raise CheckpointError(f"a checkpoint's step must be 0 or more, not {step}")
    name = f"step-{step:08d}"
    if generation is not None:
        if not _GENERATION.fullmatch(str(generation)):
            raise CheckpointError(
                f"a checkpoint's generation must be 1 to 64 letters, digits, '_' or '-', not {str(generation)!r}"
            )
        name += f"{TEMPORARY}{generation}"
    text = os.fspath(root)
    return text.rstrip("/") + "/" + name if is_remote(root) else os.path.join(text, name)


def step_of(name: str) -> int | None:
    """The step of a directory called `name`, None when no checkpoint directory is called so."""
    found = _STEP.fullmatch(name)
    if not found:
        return None
    step = int(found[1])
    return step if name.startswith(f"step-{step:08d}") else None


def generation_of(name: str) -> str | None:
    """The generation of a temporary directory called `name`, None when it is not one."""
    found = _TEMPORARY.fullmatch(name)
    return found[1] if found else None


def is_replaced(name: str) -> bool:
    """Whether `name` is that of a checkpoint set aside while another of the same step takes its place."""
    return name.endswith(REPLACED)


def find(root: Location) -> list[str]:
    """The paths of the complete checkpoints under `root`, newest first. Complete: it has a manifest; not yet verified.

    Temporary directories and symbolic links are ignored. A root that does not exist has no checkpoints.
    """
    storage, directory, names = listed(root)
    return [storage.address(storage.join(directory, name)) for name in names]


def listed(root: Location) -> tuple[Storage, str, list[str]]:
    """Where `root` lies, and the names of the complete checkpoints in it, newest first."""
    storage, directory = locate(root)
    with os_errors(f"the checkpoints under {storage.address(directory)} cannot be listed"):
        return storage, directory, complete_in(storage, directory)


def complete_in(storage: Storage, directory: str) -> list[str]:
    """The names of the complete checkpoints in `directory`, newest first. Raises OSError."""
    found: list[tuple[int, bool, str]] = []
    for name, entry in storage.entries(directory).items():
        step = step_of(name)
        if step is None or entry.kind != "directory":
            continue
        if storage.entry(storage.join(storage.join(directory, name), MANIFEST_FILE)):
            found.append((step, not is_replaced(name), name))
    return [name for _, _, name in sorted(found, reverse=True)]


def newest_in_words(storage: Storage, directory: str) -> str:
    """What there is to go on with when a save has failed."""
    try:
        names = complete_in(storage, directory)
    except OSError as error:
        return f"the checkpoints before it cannot be listed: {error}"
    return f"the newest complete checkpoint is still {names[0]}" if names else "there is no checkpoint yet"


def tensor_key_problem(key: str) -> str | None:
    """What is wrong with `<slot>/<name>` as a tensor's key, None if nothing."""
    slot, _, name = key.partition("/")
    if not re.fullmatch(SLOT_PATTERN, slot):
        return f"slot {slot!r} is not lower-case letters, digits and '_'"
    if not name or len(name) > LONGEST_TENSOR_NAME:
        return f"a tensor's name must have 1 to {LONGEST_TENSOR_NAME} characters"
    if not name.isprintable() or "\\" in name:
        return f"the name {name!r} has control characters or backslashes"
    if any(part in ("", ".", "..") for part in name.split("/")):
        return f"the name {name!r} reads as a path that leads elsewhere"
    return None
