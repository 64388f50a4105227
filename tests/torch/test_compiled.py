"""Compiled blocks: the numbers of eager ones, and no more programs than there are shapes of blocks.

Most cases stop before the C++ compiler, which takes seconds for each program: `TRACED` traces, differentiates and divides a
block as inductor does, and runs the outcome operation by operation. Inductor itself runs where a case says so.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mpsdk.backend import Place
from mpsdk.errors import ConfigError
from mpsdk.estimate import estimate
from mpsdk.initialise import RandomSource
from mpsdk.plan import Plan
from tests.cases import BOUND, Outcome, assemble, assert_parity, global_batch, rows_of
from tests.layouts import LAYOUTS, RECOMPUTE
from tests.torch.cases import _record_first_gradients, make_plan, train
from tests.torch.pool import CaseError, WorkerPool
from tests.torch.test_parity import reference

TRACED = "aot_eager_decomp_partition"
INDUCTOR = "inductor"
STEPS = 3


@dataclass(frozen=True)
class Report:
    """A training on one rank: what came of it, and what the compiler did for it."""

    outcome: Outcome
    evaluated: list[float]  # the loss of each step's batch, before the step
    programs: list[int]  # graphs compiled so far, after each step
    breaks: int
    notes: list[str]


def use(compiler: str) -> Callable[[], tuple[int, int]]:
    """Compile by `compiler` from here on. Gives what tells the graphs compiled and broken since, the probe's apart."""
    from torch._dynamo.utils import counters

    from mpsdk_torch import compiled

    compiled.COMPILER = compiler
    counters.clear()
    return lambda: (counters["stats"]["unique_graphs"] - 1, sum(counters["graph_break"].values()))


def train_compiled(place: Place, compiler: str, plan: Plan) -> Report:
    """STEPS steps, each after an evaluation of its batch."""
    from mpsdk_torch.backend import TorchBackend

    report = Report(Outcome([], []), [], [], 0, [])
    count, backend = use(compiler), TorchBackend()
    try:
        backend.build(plan, replace(place, note=report.notes.append))
        backend.load(RandomSource(plan.description, plan.training.seed))
        _record_first_gradients(backend, report.outcome.gradients)
        for step in range(STEPS):
            batch = rows_of(global_batch(step, plan.description.vocab_size or 0), plan, place.rank)
            found = backend.evaluate(batch, step=step)
            report.evaluated.append(found.loss / found.count)
            rate = plan.training.learning_rate_at(step)
            values = backend.step(batch, step=step, learning_rate=rate).read()
            report.outcome.losses.append(values["loss"])
            report.outcome.norms.append(values["grad_norm"])
            report.programs.append(count()[0])
        return replace(report, breaks=count()[1])
    finally:
        backend.close()


def run(
    pool: WorkerPool, compiler: str, family: str, layout: str, recompute: str = "none", **training: Any
) -> list[Report]:
    world_size, distribution = LAYOUTS.get(layout, (1, {}))
    distribution = distribution | {"compile": True}
    if recompute != "none":
        distribution |= {"activation_checkpointing": RECOMPUTE[recompute]}
    plan = make_plan(family, world_size, distribution, **training)
    return pool.run(world_size, train_compiled, compiler, plan)


def assert_as_eager(pool: WorkerPool, family: str, reports: list[Report], *, programs: int) -> None:
    """The eager single process's numbers, from `programs` graphs on each rank, all there after the first step."""
    assert_parity([report.outcome for report in reports], reference(pool, family, STEPS))
    for report in reports:
        np.testing.assert_allclose(report.evaluated, report.outcome.losses, rtol=BOUND)
        assert report.programs == [programs] * STEPS


# One program to train with and one to evaluate with. A block with deferred weight gradients has five parts between its linear
# layers: norm; attention; residual and norm; activation; residual. With tensor parallelism the gathers before attention and
# feed-forward are two more.
WHOLE: list[Any] = [
    ("gpt2", "single", "none", 2),
    ("llama", "sdp2-parameters", "none", 2),
    ("gpt2", "sdp2-optimizer", "full", 2),
    ("llama", "tp2-no-sequence", "full", 2),
    ("gpt2", "tp2", "selective-both", 2),
    ("llama", "single", "selective-attention", 2),
    ("gpt2", "pp2", "full-offload", 3),  # its forward keeps no graph, its recompute does
    ("llama", "pp2-tp2-interleaved", "none", 2),
    pytest.param("gpt2", "pp2-sdp2-tp2", "none", 2, marks=pytest.mark.long),
]
BROKEN: list[Any] = [
    ("gpt2", "pp2-sdp2-zb-h1", "none", 10),
    pytest.param("llama", "pp2-tp2-zb-h1", "full", 14, marks=pytest.mark.long),
    ("llama", "pp2-sdp2-zb-v", "none", 10),
]


@pytest.mark.parametrize(("family", "layout", "recompute", "programs"), WHOLE)
def test_a_block_is_one_graph_and_trains_as_eager(
    pool: WorkerPool, family: str, layout: str, recompute: str, programs: int
) -> None:
    reports = run(pool, TRACED, family, layout, recompute)
    assert_as_eager(pool, family, reports, programs=programs)
    assert [report.breaks for report in reports] == [0] * len(reports)


@pytest.mark.parametrize(("family", "layout", "recompute", "programs"), BROKEN)
def test_a_split_backward_trains_as_eager(
    pool: WorkerPool, family: str, layout: str, recompute: str, programs: int
) -> None:
    assert_as_eager(pool, family, run(pool, TRACED, family, layout, recompute), programs=programs)


@pytest.mark.parametrize(
    ("family", "layout", "programs"),
    [
        ("gpt2", "single", 2),
        pytest.param("llama", "sdp2-parameters", 2, marks=pytest.mark.long),
        pytest.param("llama", "tp2", 2, marks=pytest.mark.long),
        pytest.param("llama", "pp2-sdp2-zb-v", 10, marks=pytest.mark.long),
        pytest.param("gpt2", "pp2-tp2-interleaved", 2, marks=pytest.mark.long),
        pytest.param("gpt2", "pp2-tp2-zb-h1", 14, marks=pytest.mark.long),
    ],
)
def test_inductor_trains_as_eager(pool: WorkerPool, family: str, layout: str, programs: int) -> None:
    reports = run(pool, INDUCTOR, family, layout)
    assert_as_eager(pool, family, reports, programs=programs)
    assert "compiling" in reports[0].notes  # what keeps a rank from being taken for hung


@pytest.mark.long
@pytest.mark.parametrize("recompute", RECOMPUTE)
def test_inductor_recomputes_as_eager(pool: WorkerPool, recompute: str) -> None:
    programs = 3 if recompute == "full-offload" else 2
    assert_as_eager(pool, "gpt2", run(pool, INDUCTOR, "gpt2", "single", recompute), programs=programs)


@pytest.mark.long
@pytest.mark.parametrize("layout", ["sdp2-parameters", "pp2-sdp2-zb-h1"])
def test_inductor_follows_fp32_in_bf16_to_its_rounding(pool: WorkerPool, layout: str) -> None:
    world_size, distribution = LAYOUTS[layout]
    plan = make_plan("gpt2", world_size, distribution | {"compile": True, "precision": "bf16"})
    reports, expected = pool.run(world_size, train_compiled, INDUCTOR, plan), reference(pool, "gpt2", STEPS)
    np.testing.assert_allclose(reports[0].outcome.losses, expected[0].losses, rtol=2.0**-8)
    np.testing.assert_allclose(reports[0].outcome.norms, expected[0].norms, rtol=2.0**-4)


def train_state(place: Place, plan: Plan) -> Outcome:
    use(TRACED)
    return train(place, plan, STEPS)


@pytest.mark.parametrize("layout", ["single", "tp2"])
def test_dropout_masks_are_those_of_eager_and_recompute_repeats_them(pool: WorkerPool, layout: str) -> None:
    world_size, distribution = LAYOUTS.get(layout, (1, {}))
    eager, kept, full = (
        pool.run(world_size, train_state, make_plan("gpt2", world_size, distribution | more, dropout=0.1))
        for more in ({}, {"compile": True}, {"compile": True, "activation_checkpointing": "full"})
    )
    assert_parity(kept, eager)
    assert full[0].losses == kept[0].losses
    actual, expected = (assemble([piece for o in some for piece in o.state]) for some in (full, kept))
    for name in expected:
        np.testing.assert_array_equal(actual[name], expected[name], err_msg=name)


def test_new_moments_of_dropout_compile_nothing(pool: WorkerPool) -> None:
    (report,) = run(pool, TRACED, "gpt2", "single", dropout=0.1)
    assert report.programs == [report.programs[0]] * STEPS


def attentions(place: Place, plan: Plan) -> int:
    """How often one step's forward passes attend, recompute included."""
    import torch

    from mpsdk_torch.backend import TorchBackend

    use(TRACED)
    backend = TorchBackend()
    try:
        backend.build(plan, place)
        backend.load(RandomSource(plan.description, plan.training.seed))
        batches = [
            rows_of(global_batch(step, plan.description.vocab_size or 0), plan, place.rank)
            for step in range(2)
        ]
        backend.step(batches[0], step=0, learning_rate=1e-3).read()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            backend.step(batches[1], step=1, learning_rate=1e-3).read()
        counts = {event.key: event.count for event in profile.key_averages()}
        return counts["aten::_scaled_dot_product_flash_attention_for_cpu"]
    finally:
        backend.close()


@pytest.mark.parametrize(
    ("layout", "recompute", "times"),
    [
        ("pp2", "full", 2),
        ("pp2", "selective-attention", 1),
        ("pp2-zb-h1", "none", 1),
    ],
)
def test_a_block_runs_as_often_as_recompute_says(
    pool: WorkerPool, layout: str, recompute: str, times: int
) -> None:
    world_size, distribution = LAYOUTS[layout]
    distribution = distribution | {"compile": True}
    if recompute != "none":
        distribution |= {"activation_checkpointing": RECOMPUTE[recompute]}
    plan = make_plan("gpt2", world_size, distribution)
    passes = plan.training.accumulation * plan.microbatches
    blocks = [plan.stages[rank][1] - plan.stages[rank][0] for rank in range(world_size)]
    assert pool.run(world_size, attentions, plan) == [times * passes * count for count in blocks]


def saved_bytes(place: Place, plan: Plan) -> int:
    """Bytes that autograd saves in one microbatch's forward, what was there before apart."""
    import torch

    from mpsdk_torch.backend import TorchBackend
    from mpsdk_torch.loss import cross_entropy_sum

    use(TRACED)
    vocab = plan.description.vocab_size
    assert vocab is not None
    backend = TorchBackend()
    try:
        backend.build(plan, place)
        backend.load(RandomSource(plan.description, plan.training.seed))
        (stage,) = backend._ready.trainer.stages.values()
        ids = torch.randint(vocab, (plan.microbatch_size, plan.training.sequence_length))
        rotary = stage.blocks["0"].attention.rotary
        tables = [] if rotary is None else [table for pair in rotary._made.values() for table in pair]
        old = {tensor.untyped_storage()._cdata for tensor in (ids, *stage.parameters(), *tables)}
        saved: dict[int, torch.UntypedStorage] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in old:
                saved[storage._cdata] = storage
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            cross_entropy_sum(stage(ids, None), ids, vocab_size=vocab, group=backend._ready.groups.tensor)
        return sum(storage.nbytes() for storage in saved.values())
    finally:
        backend.close()


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("recompute", ["none", "selective-attention"])
def test_a_microbatch_keeps_no_more_than_the_estimate_says_of_eager(
    pool: WorkerPool, family: str, recompute: str
) -> None:
    distribution: dict[str, Any] = {"compile": True, "pipeline": {"microbatches": 2}}
    if recompute != "none":
        distribution["activation_checkpointing"] = RECOMPUTE[recompute]
    plan = make_plan(family, 1, distribution)
    (saved,) = pool.run(1, saved_bytes, plan)
    assert saved <= estimate(plan, device="cpu").memory_of(0).activations_of_one


def build_without_a_compiler(place: Place, plan: Plan, cache: str) -> None:
    import torch
    from torch._dynamo.callback import callback_handler
    from torch._inductor import cpp_builder

    from mpsdk_torch.backend import TorchBackend

    use(INDUCTOR)
    cpp_builder.cpp_compiler_search.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", cache)
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", cache)
        try:
            TorchBackend().build(plan, place)
        finally:
            assert not callback_handler.start_callbacks and not callback_handler.end_callbacks
            assert not torch.compiler.config.fail_on_recompile_limit_hit


def test_a_machine_without_a_compiler_is_told_so_before_training(pool: WorkerPool, tmp_path: Path) -> None:
    plan = make_plan("gpt2", 1, {"compile": True})
    with pytest.raises(CaseError, match=r"BackendError: compile: true .*C\+\+ compiler.*set compile: false"):
        pool.run(1, build_without_a_compiler, plan, str(tmp_path))


@pytest.mark.parametrize(
    ("distribution", "training", "said"),
    [
        ({"compile": "auto"}, {}, "write true or false"),
        (
            {"activation_checkpointing": "selective", "pipeline": LAYOUTS["pp2-zb-h1"][1]["pipeline"]},
            {},
            'can\'t be compiled together with schedule "zb-h1"',
        ),
        (
            {"activation_checkpointing": "selective"},
            {"dropout": 0.1},
            "can't be compiled together with dropout",
        ),
    ],
)
def test_what_can_not_be_compiled_is_refused(
    distribution: dict[str, Any], training: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        make_plan("gpt2", 2, {"compile": True} | distribution, **training)
