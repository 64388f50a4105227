"""Which checkpoints under a root to trust, to keep, and to remove."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection

from mpsdk.checkpoint.files import Files
from mpsdk.checkpoint.names import REPLACED, generation_of, is_replaced, listed, step_of
from mpsdk.checkpoint.problems import os_errors, refuse
from mpsdk.checkpoint.reader import Checkpoint
from mpsdk.checkpoint.storage import Location
from mpsdk.checkpoint.verify import find_damage
from mpsdk.errors import CheckpointError

logger = logging.getLogger(__name__)


def latest_verified(root: Location, log: Callable[[str], None] = logger.warning) -> Checkpoint | None:
    """The newest checkpoint under `root` of which every byte is right. None when there is no checkpoint at all.

    Each damaged one that is passed over is told to `log`, with what is wrong.

    Raises:
        CheckpointError: there are checkpoints and none is intact. Starting afresh must be somebody's decision.
    """
    storage, directory, names = listed(root)
    damaged: list[str] = []
    for name in names:
        path = storage.join(directory, name)
        manifest, problems = find_damage(storage, path)
        if manifest and not problems:
            return Checkpoint(Files(storage, path, manifest))
        log(f"checkpoint {storage.address(path)} is damaged and passed over: {'; '.join(problems)}")
        damaged += [f"{name}: {problem}" for problem in problems]
    if damaged:
        raise refuse(
            f"no checkpoint in {storage.address(directory)} is intact",
            damaged,
            "Restore one of them from a copy, or move them away to start from the first step.",
        )
    return None


def prune(
    root: Location, keep: int | None, *, protect: Collection[int] = (), payload: bool = True
) -> list[str]:
    """Remove all but the newest `keep` complete checkpoints under `root`; None keeps all.

    If none of these is intact, the older ones down to the newest intact one stay as well; so no pruning ever removes
    the last checkpoint that can be resumed from.

    Args:
        protect: steps never removed, such as the one just committed when newer ones of an abandoned run lie beside it.
        payload: False trusts the tensors' bytes without reading them, and checks the rest.

    Returns:
        The paths removed.

    Raises:
        CheckpointError: `keep` is less than 1, or something could not be removed.
    """
    if keep is None:
        return []
    if keep < 1:
        raise CheckpointError(f"keep must be 1 or more, or None to keep all checkpoints; got {keep}")
    storage, directory, names = listed(root)
    if len(names) <= keep:
        return []
    paths = {name: storage.join(directory, name) for name in names}
    intact = 0  # position of the newest intact one
    while intact < len(names) and find_damage(storage, paths[names[intact]], payload=payload)[1]:
        intact += 1
    doomed = [name for name in names[max(keep, intact + 1) :] if step_of(name) not in protect]
    with os_errors("old checkpoints could not be removed"):
        for name in reversed(doomed):
            storage.remove_directory(paths[name])
    return [storage.address(paths[name]) for name in doomed]


def remove_leftovers(root: Location, *, generation: int | str | None = None) -> list[str]:
    """Remove what interrupted saves and removals left under `root`, except of `generation`, which may be saving now.

    To be called when no other process saves there: at the start of a run, by one rank.

    Returns:
        The paths removed.
    """
    storage, directory, complete = listed(root)
    removed: list[str] = []
    with os_errors("what interrupted saves left could not be removed"):
        for name, entry in sorted(storage.entries(directory).items()):
            if entry.kind != "directory":
                continue
            left = generation_of(name)
            unfinished = left is not None and left != str(generation)
            superseded = is_replaced(name) and name.removesuffix(REPLACED) in complete
            if unfinished or superseded:
                path = storage.join(directory, name)
                storage.remove_directory(path)
                removed.append(storage.address(path))
    return removed
