"""Whoever takes part, each in a module of its own so that a process loads the libraries of one only.

A contender's module has functions that make a `Contender`; `benchmarks.peers` names them as "module:function".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from benchmarks.sizes import Size


@dataclass(frozen=True)
class Seat:
    """Where a contender's process stands, and the model that it trains: a directory that transformers loads."""

    rank: int
    world_size: int
    store: str
    size: Size
    model: str
    options: dict[str, object]


class Contender(Protocol):
    def step(self, step: int) -> None:
        """Take step number `step` on this rank's share of the batch."""
        ...

    def loss(self) -> float:
        """The global batch's mean loss of the last step, on every rank. Waits for the step to end."""
        ...


def rows_of(seat: Seat, step: int, data_rank: int, data_size: int) -> tuple:  # type: ignore[type-arg]
    ids, labels = seat.size.rows(step)
    share = seat.size.batch // data_size
    mine = slice(data_rank * share, (data_rank + 1) * share)
    return ids[mine], labels[mine]
