"""A checkpoint read by the ranks of one layout, and written again as they hold it."""

from __future__ import annotations

from typing import Any

from mpsdk.backend import Backend, Place
from mpsdk.checkpoint import Checkpoint, write_rank
from mpsdk.initialise import RandomSource
from mpsdk.plan import Plan
from tests.cases import batch_of, rows_of


def pass_on(backend: Backend, place: Place, plan: Plan, source: str | None, unfinished: str) -> Any:
    """What `commit` takes of this rank. `source`: the checkpoint to read; None: two steps from initial weights."""
    try:
        backend.build(plan, place)
        if source is not None:
            backend.load(Checkpoint.open(source))
        else:
            backend.load(RandomSource(plan.description, plan.training.seed))
            for step in range(2):
                backend.step(
                    rows_of(batch_of(plan, step), plan, place.rank), step=step, learning_rate=1e-3
                ).read()
        return write_rank(unfinished, place.rank, backend.shards())
    finally:
        backend.close()
