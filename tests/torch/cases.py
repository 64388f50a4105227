"""What a pool's workers run: a short training under a plan, and what came of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from mpsdk.backend import Place, TensorSource
from mpsdk.plan import Plan
from tests import cases
from tests.cases import Outcome, Piece

make_plan = partial(cases.make_plan, framework="torch")


def train(
    place: Place,
    plan: Plan,
    steps: int,
    *,
    source: TensorSource | None = None,
    start: int = 0,
    gradients: bool = True,
) -> Outcome:
    """`steps` optimizer steps from `source`, or from the plan's own initial weights."""
    from mpsdk_torch.backend import TorchBackend

    backend = TorchBackend()

    def prepare(outcome: Outcome) -> None:
        if gradients:
            _record_first_gradients(backend, outcome.gradients)

    return cases.train(backend, place, plan, steps, source=source, start=start, prepare=prepare)


def train_each(place: Place, jobs: Sequence[tuple[Plan, int]]) -> list[Outcome]:
    """`train` under each plan for so many steps, one after the other."""
    return [
        train(replace(place, store=f"{place.store}-{number}"), plan, steps)
        for number, (plan, steps) in enumerate(jobs)
    ]


def evaluate_then_train(place: Place, plan: Plan, steps: int) -> tuple[list[float], list[float]]:
    """For each step the batch's loss evaluated before the step, and the loss that the step saw."""
    from mpsdk_torch.backend import TorchBackend

    return cases.evaluate_then_train(TorchBackend(), place, plan, steps)


def _record_first_gradients(backend: Any, into: list[Piece]) -> None:
    """Keep the reduced, unclipped gradients of the first update, by canonical slice."""
    from mpsdk_torch.checkpoint import _to_numpy, _valid

    optimizer = backend._ready.optimizer
    update = optimizer._torch.step

    def recording() -> None:
        if not into and backend._ready.groups.coordinates.dp == 0:
            for item in optimizer.held:
                offset, shape = item.canonical_slice
                if item.planned.owned and 0 not in shape:
                    gradient = _to_numpy(_valid(item.gradient, shape))
                    into.append((item.planned.name, item.planned.tensor.shape, offset, gradient))
        update()

    optimizer._torch.step = recording


def pass_on(place: Place, plan: Plan, source: str | None, unfinished: str) -> Any:
    """See `tests.passed_on`."""
    from mpsdk_torch.backend import TorchBackend
    from tests.passed_on import pass_on

    return pass_on(TorchBackend(), place, plan, source, unfinished)
