"""The seam between the core and a framework: eight verbs, and the plain data that passes through them.

A backend is found by name through the entry-point group `mpsdk.backends`; looking one up imports its framework, and
`limits_of` doesn't.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from mpsdk.errors import BackendError, Problem

if TYPE_CHECKING:
    from mpsdk.config import Distribution, Training
    from mpsdk.description import ModelDescription
    from mpsdk.plan import Plan

Batch = Mapping[str, NDArray[np.int32]]
"""One data rank's rows of a step: `input_ids` and `labels`, each of shape
(accumulation, microbatches, microbatch size, sequence length); label -100 is ignored. Labels of sequences have no last
dimension. Where rows are padded, `attention_mask` of `input_ids`' shape, 0 at padding; where the model knows types of tokens,
`token_type_ids`."""

IGNORED_LABEL = -100
WEIGHT = "weight"
# The scalars of a rank's state.
OPTIMIZER_STEP = "optimizer_step"
LOSS_SCALE = "loss_scale"
GOOD_STEPS = "loss_scale_good_steps"


@dataclass(frozen=True)
class Place:
    """Where a worker process stands, as its launcher said."""

    rank: int
    world_size: int
    local_rank: int = 0
    store: str | None = None  # a file for the rendezvous; None: MASTER_ADDR and MASTER_PORT
    folder: str | None = None  # where there may be no store: one that only the ranks of this start use
    timeout: float = 600.0  # seconds that a rank may wait for another
    note: Callable[[str], None] = field(default=lambda activity: None)
    """Told what the rank is about to do or wait for; the launcher shows it when a rank hangs."""


@dataclass(frozen=True)
class Shard:
    """A rectangular piece of one canonical tensor (or of one of its optimizer slots) that this rank is to write.

    `read` gives its values as float32, shape `shape`, standing at `offset` in the tensor of global shape `global_shape`.
    """

    name: str
    slot: str  # "weight", "exp_avg", "exp_avg_sq", "momentum"
    global_shape: tuple[int, ...]
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    read: Callable[[], NDArray[np.float32]]


@dataclass(frozen=True)
class RankState:
    """What one rank contributes to a checkpoint: each piece is written by exactly one rank; scalars are equal on all."""

    shards: Iterable[Shard]
    scalars: Mapping[str, float | int]


@runtime_checkable
class TensorSource(Protocol):
    """Anything that weights come from: the initialiser, a Hugging Face directory, a checkpoint."""

    @property
    def slots(self) -> frozenset[str]:
        """The slots that `read` knows: at least "weight"."""
        ...

    @property
    def scalars(self) -> Mapping[str, float | int]: ...

    def read(
        self, name: str, slot: str, offset: tuple[int, ...], shape: tuple[int, ...]
    ) -> NDArray[np.float32]:
        """The slice of `shape` at `offset` of canonical tensor `name`. Raises CheckpointError if it can't be had."""
        ...


@dataclass(frozen=True)
class Evaluation:
    """One batch evaluated, over all data ranks: the sum of losses, how many labels they are of, and, of a classifier, how many
    labels of each class (row) it took for each class (column)."""

    loss: float
    count: float
    confusion: NDArray[np.int64] | None = None

    def joined(self, other: Evaluation) -> Evaluation:
        """Both batches as one."""
        found = [part.confusion for part in (self, other) if part.confusion is not None]
        confusion = sum(found[1:], found[0]) if found else None
        return Evaluation(self.loss + other.loss, self.count + other.count, confusion)


class StepResult(Protocol):
    """A step under way. Nothing is read back from the device until `read` is called, by all ranks together."""

    def read(self, *, stop: bool = False) -> dict[str, float]:
        """`loss`, `grad_norm`, `peak_memory_bytes` (the largest of any rank), under fp16 `loss_scale`,
        and `stop`: 1.0 when any rank passed `stop=True`."""
        ...

    def wait(self) -> None:
        """Until this rank's device has done the step. Not collective."""
        ...


@runtime_checkable
class Backend(Protocol):
    """What a framework supplies. One object a worker process; `build` comes first, `close` last."""

    def describe(self, model: object) -> ModelDescription:
        """The description of a model that no family's table covers: of what a `mpsdk.factory.Factory` makes.

        Raises ConfigError when it can't be described.
        """
        ...

    def build(self, plan: Plan, place: Place) -> None:
        """Join the other ranks and make this rank's part of the model and its optimizer.

        Weights are unfilled, but for a model that a factory makes: they are the factory's.
        """
        ...

    def step(self, batch: Batch, *, step: int, learning_rate: float) -> StepResult:
        """One optimizer step, numbered from 0, on this data rank's rows."""
        ...

    def profile(self, directory: Path | None) -> AbstractContextManager[None]:
        """Around one step: write what it does on this rank to `directory`, as `mpsdk.profile` has it.

        Entered by all ranks together, with None by those that leave nothing. The step's results are those of any other.
        """
        ...

    def evaluate(self, batch: Batch, *, step: int) -> Evaluation:
        """Over all data ranks, without training."""
        ...

    def shards(self) -> RankState:
        """This rank's part of a checkpoint."""
        ...

    def load(self, source: TensorSource) -> None:
        """Fill weights, and optimizer slots if the source has them, slice by slice."""
        ...

    def close(self) -> None:
        """Leave the other ranks. Safe to call twice."""
        ...


GROUP = "mpsdk.backends"
LIMITS_GROUP = "mpsdk.limits"
EXTRAS = {"torch": "torch", "tensorflow": "tf"}


def load_backend(framework: str) -> Backend:
    """The backend for `framework`, imported now. Raises BackendError when it is not installed."""
    found = entry_points(group=GROUP, name=framework)
    if not found:
        known = sorted({entry.name for entry in entry_points(group=GROUP)})
        raise BackendError(f"no backend for framework {framework!r} is installed; installed: {known}")
    (entry,) = found
    try:
        factory = entry.load()
    except ImportError as error:
        extra = EXTRAS.get(framework, framework)
        raise BackendError(
            f"framework {framework!r} could not be imported ({error}); install it with: pip install 'mpsdk[{extra}]'"
        ) from error
    backend: Backend = factory()
    return backend


Limits = Callable[["Distribution", "Training", "ModelDescription"], list[Problem]]


def limits_of(framework: str) -> Limits | None:
    """The function that lists what `framework`'s backend can't do; imports no framework. None: no such backend."""
    found = entry_points(group=LIMITS_GROUP, name=framework)
    if not found:
        return None
    (entry,) = found
    limits: Limits = entry.load()
    return limits
