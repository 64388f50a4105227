"""Blocks to pipeline stages, so that the largest stage costs as little as can be."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mpsdk.errors import ConfigError, Problem

# Costs are counted in whole parts of the model's total: sums are exact then, and equal costs compare equal.
_RESOLUTION = 2**40
_NEVER = 2**61  # twice that still fits 64 bits

Table = NDArray[np.int64]


class Cost(NamedTuple):
    """What a part of the model costs. Any units will do, since only its share of the whole counts."""

    compute: float
    memory: float


def partition_blocks(
    costs: Sequence[Cost],
    stages: int,
    *,
    embedding: Cost,
    head: Cost,
    memory_weight: float,
    in_flight: Sequence[float] | None = None,
) -> tuple[int, ...]:
    """How many consecutive blocks each stage gets: at least one, and such that the largest stage costs least.

    With w = `memory_weight`, a stage costs (1-w) * compute / all compute + w * memory / all memory. The first stage
    has the embedding on top of its blocks, the last one the head.

    Exact, by dynamic programming over stages and first blocks: stages * blocks^2 steps, in numpy. Of the partitions
    with the smallest largest stage, the one with the smallest sum of squared stage costs is taken, which keeps the
    other stages even too; of those, the one with fewest blocks on the first stage, then on the second, and so on,
    since earlier stages have more microbatches in flight. Costs of blocks are rounded to 2^-40 of the whole.

    >>> partition_blocks([Cost(1, 1)] * 10, 4, embedding=Cost(0, 0), head=Cost(0, 0), memory_weight=0.5)
    (2, 2, 3, 3)

    Args:
        costs: one for each block, in model order.
        stages: of the whole pipeline, virtual ones included.
        embedding: on top of the first stage.
        head: on top of the last stage.
        memory_weight: from 0, where only compute counts, to 1, where only memory does.
        in_flight: for each stage, a factor for the memory of its blocks (not of embedding and head): its microbatches
            in flight, say, where `memory` is that of activations. Only ratios count: the mean is taken as 1.

    Raises:
        ConfigError: fewer blocks than stages; a weight, cost or factor out of range.
    """
    factors = [1.0] * stages if in_flight is None else list(in_flight)
    _check(costs, stages, (embedding, head), memory_weight, factors)
    compute = np.array([cost.compute for cost in costs], dtype=np.float64)
    memory = np.array([cost.memory for cost in costs], dtype=np.float64)
    compute_part = (1 - memory_weight) / ((compute.sum() + embedding.compute + head.compute) or 1.0)
    memory_part = memory_weight / ((memory.sum() + embedding.memory + head.memory) or 1.0)

    def parts(compute: NDArray[np.float64], memory: NDArray[np.float64]) -> Table:
        return np.rint((compute * compute_part + memory * memory_part) * _RESOLUTION).astype(np.int64)

    ends = parts(np.array([embedding.compute, head.compute]), np.array([embedding.memory, head.memory]))
    blocks = np.arange(len(costs) + 1)
    backwards = blocks[:, None] >= blocks  # a stage that would end where it starts, or before
    made: dict[tuple[float, bool, bool], Table] = {}

    def stage_costs(stage: int) -> Table:
        """The cost of `stage` if it had the blocks from (row) to (column)."""
        first, last = stage == 0, stage == stages - 1
        factor = factors[stage] * stages / sum(factors)
        if (factor, first, last) not in made:
            until = np.concatenate(([0], np.cumsum(parts(compute, memory * factor))))
            extra = (ends[0] if first else 0) + (ends[1] if last else 0)
            made[factor, first, last] = np.where(backwards, _NEVER, until - until[:, None] + extra)
        return made[factor, first, last]

    limit, _ = _solve(len(costs), stages, stage_costs, np.maximum)
    # Shares add up to at most 1 for compute and `stages` for memory, so squares of shifted costs fit 60 bits together.
    shift = 10 + (stages + 1).bit_length()

    def squares(stage: int) -> Table:
        table = stage_costs(stage)
        return np.where(table <= limit, (table >> shift) ** 2, _NEVER)

    _, counts = _solve(len(costs), stages, squares, np.add)
    return counts


def _solve(
    blocks: int,
    stages: int,
    stage_costs: Callable[[int], Table],
    combine: Callable[[Table, Table], Table],
) -> tuple[int, tuple[int, ...]]:
    """The smallest total of `stages` stages over all blocks, and the counts that give it, fewest first."""
    best = np.full(blocks + 1, _NEVER)  # of the stages from here on, by their first block
    best[blocks] = 0
    choices: list[NDArray[np.intp]] = []
    for stage in reversed(range(stages)):
        totals = np.minimum(combine(stage_costs(stage), best), _NEVER)
        choices.append(totals.argmin(axis=1))
        best = totals.min(axis=1)
    counts: list[int] = []
    start = 0
    for choice in reversed(choices):
        stop = int(choice[start])
        counts.append(stop - start)
        start = stop
    return int(best[0]), tuple(counts)


def _check(
    costs: Sequence[Cost],
    stages: int,
    ends: tuple[Cost, Cost],
    memory_weight: float,
    factors: Sequence[float],
) -> None:
    problems: list[Problem] = []
    if not 1 <= stages <= len(costs):
        remedy = f"each stage needs a block, and there are {len(costs)}; use 1 to {len(costs)} stages"
        problems.append(Problem("stages", stages, remedy))
    if not 0 <= memory_weight <= 1:
        problems.append(
            Problem("memory_weight", memory_weight, "must be from 0 (compute only) to 1 (memory only)")
        )
    if len(factors) != stages or not all(0 < factor < float("inf") for factor in factors):
        problems.append(Problem("in_flight", factors, f"must be {stages} numbers above 0, one a stage"))
    if not all(0 <= value < float("inf") for cost in (*costs, *ends) for value in cost):
        problems.append(Problem("costs", [*ends, *costs], "must be finite, and not below 0"))
    if problems:
        raise ConfigError(problems, where="the partition into stages")
