"""What the executor does with a schedule: everything once, and the same however late ranks and messages are."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import wraps
from itertools import product
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import pytest
from torch import Tensor

from mpsdk.backend import Place
from mpsdk.initialise import RandomSource
from mpsdk.plan import Plan
from mpsdk.schedule import GENERATORS
from tests.cases import Outcome, assemble, global_batch, rows_of
from tests.layouts import RECOMPUTE
from tests.torch.cases import evaluate_then_train, make_plan, train
from tests.torch.pool import WorkerPool

VIRTUAL_STAGES = {"interleaved": 2, "zb-v": 2}
SPLIT = {"zb-h1", "zb-v"}
LATEST = 0.004  # seconds that an action or a message is late at most
SEEDS = (1, 2)


def pipeline(schedule: str, degree: int, microbatches: int) -> dict[str, Any]:
    virtual_stages = VIRTUAL_STAGES.get(schedule, 1)
    return {
        "degree": degree, "microbatches": microbatches, "schedule": schedule, "virtual_stages": virtual_stages,
    }  # fmt: skip


class Counts(NamedTuple):
    """What a rank did in one step. Blocks are counted by (block, microbatch of the step), matrices by name."""

    forwards: Counter[tuple[int, int]]
    backwards: Counter[tuple[int, int]]
    evaluations: Counter[tuple[int, int]]
    at_once: Counter[int]  # weight gradients made inside of a backward, by parameter of this rank
    deferred: Counter[int]  # made by a call that was left for later
    matrices: int  # parameters whose gradient can be deferred
    kept: list[str]  # what the executor still held of a pass after its end


def count_each(place: Place, plans: list[Plan]) -> list[Counts]:
    return [count(replace(place, store=f"{place.store}-{number}"), plan) for number, plan in enumerate(plans)]


def count(place: Place, plan: Plan) -> Counts:
    """One evaluation and one step, of which everything is counted."""
    from mpsdk_torch import executor
    from mpsdk_torch.backend import TorchBackend
    from mpsdk_torch.nn import DistributedLinear, DistributedOutput, deferred

    passes: list[Any] = []

    class KeptPass(executor._Pass):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            passes.append(self)

    forwards, backwards, at_once, later = Counter(), Counter(), Counter(), Counter()
    add_gradient, apply = deferred._add_weight_gradient, deferred._DeferrableLinear.backward

    def added(leaf: Tensor, *arguments: Tensor) -> None:
        later[id(leaf)] += 1
        add_gradient(leaf, *arguments)

    def applied(ctx: Any, gradient: Tensor) -> Any:
        gradients = apply(ctx, gradient)
        at_once[id(ctx.leaf)] += gradients[1] is not None
        return gradients

    backend = TorchBackend()
    try:
        backend.build(plan, place)
        backend.load(RandomSource(plan.description, plan.training.seed))
        stages = backend._ready.trainer.stages.values()
        for stage in stages:
            for number, block in stage.blocks.items():
                block.layer = counting(block.layer, int(number), forwards, backwards)
        batch = rows_of(global_batch(0, plan.description.vocab_size or 0), plan, place.rank)
        with (
            patch.object(executor, "_Pass", KeptPass),
            patch.object(deferred, "_add_weight_gradient", added),
            patch.object(deferred._DeferrableLinear, "backward", staticmethod(applied)),
        ):
            backend.evaluate(batch, step=0)
            evaluations = Counter(forwards)
            assert not backwards and not later
            forwards.clear()
            backend.step(batch, step=0, learning_rate=1e-3)
        matrices = [
            layer
            for stage in stages
            for layer in stage.modules()
            if isinstance(layer, DistributedLinear | DistributedOutput)
        ]
        kept = [
            name
            for each in passes
            for name, value in vars(each).items()
            if isinstance(value, dict) and not isinstance(value, Counter) and value
        ]
        return Counts(forwards, backwards, evaluations, +at_once, later, len(matrices), kept)
    finally:
        backend.close()


def counting(
    layer: Callable[..., Tensor], block: int, forwards: Counter[Any], backwards: Counter[Any]
) -> Callable[..., Tensor]:
    @wraps(layer)
    def run(hidden: Tensor, moment: Any, reach: Tensor | None) -> Tensor:
        key = (block, moment.microbatch)
        forwards[key] += 1
        output = layer(hidden, moment, reach)
        if output.requires_grad:
            output.register_hook(lambda gradient: backwards.update([key]))
        return output

    return run


@pytest.mark.parametrize("schedule", GENERATORS)
def test_blocks_and_weight_gradients_run_once_a_microbatch(pool: WorkerPool, schedule: str) -> None:
    """A block's forward a second time under recompute, and nothing else twice."""
    modes = {"none": "none", **RECOMPUTE}
    plans = [
        make_plan("gpt2", 2, {"pipeline": pipeline(schedule, 2, 4), "activation_checkpointing": mode})
        for mode in modes.values()
    ]
    microbatches = 4 * plans[0].training.accumulation
    once = Counter(product(range(4), range(microbatches)))
    for mode, ranks in zip(modes, zip(*pool.run(2, count_each, plans), strict=True), strict=True):
        forwards, backwards, evaluations = (sum((rank[i] for rank in ranks), Counter()) for i in range(3))
        assert evaluations == once
        assert forwards == (once if mode == "none" else once + once), mode
        assert backwards == once, mode
        for rank in ranks:
            assert not rank.kept, mode
            assert not rank.at_once
            assert len(rank.deferred) == (rank.matrices if schedule in SPLIT else 0)
            assert set(rank.deferred.values()) <= {microbatches}, mode


class LateLinks:
    """Links on which every message takes a time of its own, while its sender goes on and other links don't wait."""

    def __init__(self, links: Any, seed: int) -> None:
        self._links, self._random, self._lock = links, random.Random(seed), threading.Lock()
        self._lines: dict[Any, ThreadPoolExecutor] = defaultdict(lambda: ThreadPoolExecutor(1))
        self._under_way: list[Future[None]] = []
        self.receive = links.receive

    def send(self, tensor: Tensor, source: int, target: int, *, forward: bool, tag: int) -> None:
        def deliver(delay: float) -> None:
            time.sleep(delay)
            with self._lock:
                self._links.send(tensor, source, target, forward=forward, tag=tag)

        line = self._lines[target, forward]
        self._under_way.append(line.submit(deliver, self._random.uniform(0, LATEST)))

    def finish(self) -> None:
        for message in self._under_way:
            message.result()
        self._under_way.clear()
        self._links.finish()


def train_late(
    place: Place, plan: Plan, seeds: tuple[int | None, ...]
) -> list[tuple[Outcome, tuple[list[float], list[float]]]]:
    """For each seed, two steps trained, and one evaluated and trained, with ranks and messages late by it; None: in time."""
    from mpsdk_torch import topology

    links = topology.StageLinks
    results = []
    for seed in seeds:
        note, late = place.note, links
        if seed is not None:
            own = random.Random(f"{seed} {place.rank}")

            def note(activity: str, own: random.Random = own) -> None:
                if own.random() < 0.3:
                    time.sleep(own.uniform(0, LATEST))

            def late(*arguments: Any, seed: int = seed) -> Any:
                return LateLinks(links(*arguments), seed)

        with patch.object(topology, "StageLinks", late):
            first, second = (replace(place, note=note, store=f"{place.store}-{seed}-{i}") for i in range(2))
            results.append((train(first, plan, 2), evaluate_then_train(second, plan, 1)))
    return results


LATE: dict[str, dict[str, Any]] = {
    **{f"pp4-{schedule}": {"pipeline": pipeline(schedule, 4, 8)} for schedule in GENERATORS},
    "pp2-tp2-interleaved": {"pipeline": pipeline("interleaved", 2, 4), "tensor_parallel": 2},
    "pp2-sdp2-zb-v": {"pipeline": pipeline("zb-v", 2, 4), "sharded_data_parallel": 2},
}


@pytest.mark.parametrize("layout", LATE)
def test_late_ranks_and_messages_change_no_bit(pool: WorkerPool, layout: str) -> None:
    plan = make_plan("gpt2-deep", 4, LATE[layout], accumulation=1, steps=2)
    prompt, *late = zip(*pool.run(4, train_late, plan, (None, *SEEDS)), strict=True)
    for ranks in late:
        for (outcome, evaluated), (expected, expected_evaluated) in zip(ranks, prompt, strict=True):
            assert outcome.losses == expected.losses
            assert outcome.norms == expected.norms
            assert evaluated == expected_evaluated
        for pieces in ("gradients", "state"):
            actual, wanted = (
                assemble([piece for outcome, _ in some for piece in getattr(outcome, pieces)])
                for some in (ranks, prompt)
            )
            assert actual.keys() == wanted.keys()
            for name in wanted:
                np.testing.assert_array_equal(actual[name], wanted[name], err_msg=name)
