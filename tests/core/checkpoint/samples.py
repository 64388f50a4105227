"""Small checkpoints for the tests of this room, written through the public functions."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mpsdk.backend import RankState, Shard
from mpsdk.checkpoint import commit, step_directory, write_rank

Tensors = Mapping[tuple[str, str], np.ndarray]  # (name, slot) -> values
SCALARS = {"optimizer_step": 7, "loss_scale": 65536.0}


def tensors(seed: int = 0) -> dict[tuple[str, str], np.ndarray]:
    """A matrix with its moments, a vector and a scalar: some 60 numbers."""
    random = np.random.default_rng(seed)

    def values(*shape: int) -> np.ndarray:
        return np.asarray(random.normal(size=shape), np.float32)

    return {
        ("blocks.0.up.weight", "weight"): values(5, 3),
        ("blocks.0.up.weight", "exp_avg"): values(5, 3),
        ("blocks.0.up.weight", "exp_avg_sq"): values(5, 3),
        ("head.norm.weight", "weight"): values(4),
        ("temperature", "weight"): values(),
    }


def shard(name: str, slot: str, whole: np.ndarray, box: tuple[slice, ...]) -> Shard:
    offset = tuple(part.start for part in box)
    shape = tuple(part.stop - part.start for part in box)
    return Shard(name, slot, whole.shape, offset, shape, lambda: whole[box])


def row_shards(contents: Tensors, ranks: int) -> list[list[Shard]]:
    """Each tensor cut into `ranks` runs of rows; a scalar goes to rank 0."""
    shards: list[list[Shard]] = [[] for _ in range(ranks)]
    for (name, slot), whole in contents.items():
        if not whole.shape:
            shards[0].append(shard(name, slot, whole, ()))
            continue
        edges = np.linspace(0, whole.shape[0], ranks + 1).astype(int).tolist()
        rest = tuple(slice(0, size) for size in whole.shape[1:])
        for rank, (start, stop) in enumerate(itertools.pairwise(edges)):
            shards[rank].append(shard(name, slot, whole, (slice(start, stop), *rest)))
    return shards


def meta(step: int, **more: object) -> dict[str, object]:
    return {
        "step": step,
        "samples_consumed": 8 * step,
        "framework": "torch",
        "plan": {"degrees": [1, 1, 2, 1, 1], "world_size": 2},
        "plan_hash": "0123abcd",
        "seeds": {"data": 1},
        **more,
    }


def write_parts(directory: str, shards: Sequence[Sequence[Shard]]) -> list[dict[str, Any]]:
    return [write_rank(directory, rank, RankState(own, SCALARS)) for rank, own in enumerate(shards)]


def save(
    root: str | Path,
    step: int,
    contents: Tensors | None = None,
    ranks: int = 2,
    generation: int = 1,
    **more: object,
) -> str:
    """Save a whole checkpoint; gives its path."""
    contents = tensors(step) if contents is None else contents
    temporary, final = step_directory(root, step, generation), step_directory(root, step)
    commit(temporary, final, write_parts(temporary, row_shards(contents, ranks)), meta(step, **more))
    return final
