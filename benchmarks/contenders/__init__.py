"""Whoever takes part, each in a module of its own so that a process loads the libraries of one only.

A contender's module has functions that make a `Contender`; `benchmarks.peers` names them as "module:function".
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Protocol

from benchmarks.sizes import Size

TORCH, TENSORFLOW = "torch", "tensorflow"
NEEDS: dict[str, tuple[str, ...]] = {
    "ours": (TORCH,),
    "loops": (TORCH, "transformers"),
    "accelerated": (TORCH, "transformers", "accelerate"),
    "schedules": (TORCH, "transformers"),
    "ours_tf": (TENSORFLOW, "keras"),
    "keras_fit": (TENSORFLOW, "keras"),
    "mirrored": (TENSORFLOW, "keras"),
}
"""By module: the libraries that its contenders stand on, the framework first."""


def missing(make: str) -> list[str]:
    """The libraries that contender "module:function" needs and that are not installed."""
    return [library for library in NEEDS[make.partition(":")[0]] if find_spec(library) is None]


def framework(make: str) -> str:
    return NEEDS[make.partition(":")[0]][0]


@dataclass(frozen=True)
class Seat:
    """Where a contender's process stands, and the model that it trains: a directory that transformers loads."""

    rank: int
    world_size: int
    store: str
    size: Size
    model: str
    options: dict[str, object]

    def share(self, data_rank: int, data_size: int) -> slice:
        """The rows of a batch that data rank `data_rank` of `data_size` takes."""
        rows = self.size.batch // data_size
        return slice(data_rank * rows, (data_rank + 1) * rows)


class Contender(Protocol):
    def step(self, step: int) -> None:
        """Take step number `step` on this rank's share of the batch."""
        ...

    def loss(self) -> float:
        """The global batch's mean loss of the last step, on every rank. Waits for the step to end."""
        ...
