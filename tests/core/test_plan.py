"""resolve and Plan: every problem at once, or a layout in which everything adds up."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpsdk.config import Distribution, Training
from mpsdk.description import ModelDescription
from mpsdk.errors import ConfigError
from mpsdk.families.describe import describe_spec
from mpsdk.families.read import read_model
from mpsdk.plan import Plan
from mpsdk.report.plan_table import WIDTH, plan_text, plan_timeline
from mpsdk.resolve import resolve

ROOT = Path(__file__).resolve().parents[2]
POSITIONS = 24


@pytest.fixture(scope="module", autouse=True)
def backend_without_limits() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mpsdk.resolve.limits_of", lambda framework: lambda *request: [])
        yield


def model_of(blocks: int, heads: int, **config: Any) -> ModelDescription:
    shape = {
        "vocab_size": 257,
        "n_positions": POSITIONS,
        "n_embd": 4 * heads,
        "n_layer": blocks,
        "n_head": heads,
    }
    return describe_spec(read_model({"model_type": "gpt2", **shape, **config}).spec)


class Request(NamedTuple):
    """What somebody might ask for, sensible or not."""

    world: int
    pp: int
    dp: int | None  # None: fill
    sdp: int
    tp: int
    sequence_parallel: bool
    blocks: int
    heads: int
    rows: int  # the global batch is rows · accumulation
    accumulation: int
    microbatches: int | None
    partition: tuple[int, ...] | None
    length: int

    @property
    def distribution(self) -> Distribution:
        pipeline: dict[str, Any] = {"degree": self.pp, "microbatches": self.microbatches}
        if self.partition:
            pipeline["partition"] = self.partition
        return Distribution(
            pipeline=pipeline,
            data_parallel=self.dp or "fill",
            sharded_data_parallel=self.sdp,
            tensor_parallel={"degree": self.tp, "sequence_parallel": self.sequence_parallel},
        )

    @property
    def training(self) -> Training:
        return Training(
            global_batch=self.rows * self.accumulation,
            accumulation=self.accumulation,
            sequence_length=self.length,
        )

    def resolve(self) -> Plan:
        return resolve(
            self.distribution,
            model_of(self.blocks, self.heads),
            self.training,
            world_size=self.world,
            framework="any",
        )

    @property
    def broken_fields(self) -> set[str]:
        """The fields that cannot work, from the definitions."""
        broken: set[str] = set()
        model = self.pp * self.sdp * self.tp
        dp = self.dp or (self.world // model if self.world % model == 0 else 1)
        if model * dp != self.world:
            broken.add("world_size")
        if self.heads % self.tp:  # the feed-forward size is 16 · heads
            broken.add("tensor_parallel.degree")
        if self.length > POSITIONS or (self.sequence_parallel and self.length % self.tp):
            broken.add("training.sequence_length")
        if self.pp > self.blocks:
            broken.add("pipeline.degree")
        if self.partition and sum(self.partition) != self.blocks:
            broken.add("pipeline.partition")
        if self.rows % (dp * self.sdp):
            broken.add("training.global_batch")
        if self.microbatches and max(1, self.rows // (dp * self.sdp)) % self.microbatches:
            broken.add("pipeline.microbatches")
        return broken


@st.composite
def requests(draw: st.DrawFn) -> Request:
    pp = draw(st.integers(1, 4))
    partition = draw(st.none() | st.tuples(*[st.integers(1, 3)] * pp))
    return Request(
        world=draw(st.integers(1, 24)),
        pp=pp,
        dp=draw(st.none() | st.integers(1, 3)),
        sdp=draw(st.integers(1, 3)),
        tp=draw(st.integers(1, 3)),
        sequence_parallel=draw(st.booleans()),
        blocks=draw(st.integers(1, 8)),
        heads=draw(st.sampled_from([2, 3, 6])),
        rows=draw(st.integers(1, 24)),
        accumulation=draw(st.integers(1, 3)),
        microbatches=draw(st.none() | st.integers(1, 6)),
        partition=partition,
        length=draw(st.sampled_from([6, 8, 12, POSITIONS, 30])),
    )


@st.composite
def possible_requests(draw: st.DrawFn) -> Request:
    """Requests that work, built from the answer."""
    pp, sdp, tp, dp = (draw(st.integers(1, most)) for most in (4, 3, 3, 3))
    microbatches, size = draw(st.integers(1, 6)), draw(st.integers(1, 3))
    return Request(
        world=pp * dp * sdp * tp,
        pp=pp,
        dp=draw(st.sampled_from([None, dp])),
        sdp=sdp,
        tp=tp,
        sequence_parallel=draw(st.booleans()),
        blocks=draw(st.integers(pp, 9)),
        heads=6,
        rows=microbatches * size * dp * sdp,
        accumulation=draw(st.integers(1, 3)),
        microbatches=draw(st.sampled_from([None, microbatches])),
        partition=None,
        length=12,
    )


@given(requests())
@settings(max_examples=200, deadline=None)
def test_every_field_that_cannot_work_is_named_and_no_other(request: Request) -> None:
    found: set[str] = set()
    try:
        request.resolve()
    except ConfigError as error:
        found = {problem.field for problem in error.problems}
    assert found == request.broken_fields


@given(possible_requests())
@settings(max_examples=60, deadline=None)
def test_what_can_work_is_planned_and_everything_adds_up(request: Request) -> None:
    plan = request.resolve()
    assert math.prod(plan.degrees) == plan.world_size == request.world
    assert sorted(block for start, stop in plan.stages for block in range(start, stop)) == list(
        range(request.blocks)
    )
    assert all(stop > start for start, stop in plan.stages)
    rows = plan.microbatch_size * plan.microbatches * plan.data_size * request.accumulation
    assert rows == plan.training.global_batch
    assert plan.padded_vocab_size % (8 * request.tp) == 0
    assert 257 <= plan.padded_vocab_size < 257 + 8 * request.tp
    stages = Counter(stage for rank in range(plan.world_size) for stage in plan.stages_of(rank))
    assert stages == {stage: plan.world_size // request.pp for stage in range(request.pp)}


@given(possible_requests())
@settings(max_examples=30, deadline=None)
def test_every_element_of_every_tensor_has_one_owner(request: Request) -> None:
    plan = request.resolve()
    owners = {
        tensor.name: np.zeros(tensor.shape, int)
        for tensor in plan.description.tensors()
        if tensor.tied_to is None
    }
    for stage in range(len(plan.stages)):
        for tp in range(plan.degrees.tp):
            for local in plan.stage_tensors(stage, tp):
                if local.owned:
                    index = tuple(
                        slice(start, start + size)
                        for start, size in zip(local.offset, local.valid, strict=True)
                    )
                    owners[local.name][index] += 1
    assert all((count == 1).all() for count in owners.values())


@given(possible_requests())
@settings(max_examples=30, deadline=None)
def test_a_plan_survives_json_with_its_hash(request: Request) -> None:
    plan = request.resolve()
    again = Plan.from_json(plan.to_json())
    assert again == plan
    assert again.hash == plan.hash
    assert [again.actions(rank) for rank in range(request.world)] == [
        plan.actions(rank) for rank in range(request.world)
    ]


def small_plan(**distribution: Any) -> Plan:
    training = Training(global_batch=8, sequence_length=12)
    parsed = Distribution.parse(distribution)
    return resolve(parsed, model_of(4, 6), training, world_size=parsed.stated_degree, framework="any")


def test_a_plan_survives_its_file(tmp_path: Path) -> None:
    plan = small_plan(pipeline=2, tensor_parallel=2)
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan


def test_the_hash_is_the_same_in_every_process_and_another_for_another_plan() -> None:
    plan = small_plan(pipeline=2)
    code = "import sys; from mpsdk.plan import Plan; print(Plan.from_json(sys.stdin.read()).hash)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        input=plan.to_json(),
        cwd=ROOT,
        env={**os.environ, "PYTHONHASHSEED": "7"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == plan.hash
    others = [
        small_plan(),
        small_plan(pipeline=2, tensor_parallel=2),
        small_plan(pipeline=2, precision="bf16"),
    ]
    assert len({plan.hash, *(other.hash for other in others)}) == 4


def test_a_plan_of_another_schedule_generator_is_refused() -> None:
    plan = small_plan(pipeline=2).model_copy(update={"schedule_hash": "0" * 32})
    with pytest.raises(ValueError, match="another version of mpsdk; plan again"):
        plan.actions(0)


def test_asynchronous_checkpoints_are_refused_whatever_the_framework() -> None:
    distribution = Distribution(checkpoint={"asynchronous": True})
    with pytest.raises(ConfigError) as refused:
        resolve(distribution, model_of(2, 2), Training(sequence_length=16), world_size=1, framework="any")
    assert [problem.field for problem in refused.value.problems] == ["checkpoint.asynchronous"]


def test_a_plan_for_thousands_of_ranks_is_quick_and_small() -> None:
    distribution = Distribution(
        pipeline={"degree": 16, "microbatches": 64}, tensor_parallel=8, sharded_data_parallel=16
    )
    model = model_of(96, 8, n_embd=512)
    training = Training(global_batch=2048, sequence_length=16)
    plan = resolve(distribution, model, training, world_size=4096, framework="any")
    assert plan.degrees.dp == 2
    assert len(plan.to_json()) < 30_000
    assert len(plan.actions(4095)) > 2 * 64


def test_the_two_ends_of_a_tied_tensor_find_each_other() -> None:
    plan = small_plan(pipeline=4, tensor_parallel=2)
    groups = {rank: plan.tied_group(rank) for rank in range(8)}
    assert groups == {0: (0, 6), 1: (1, 7), 6: (0, 6), 7: (1, 7), 2: None, 3: None, 4: None, 5: None}
    assert small_plan(tensor_parallel=2).tied_group(0) is None


# -- the printed plan ----------------------------------------------------------------------------------------------


def test_a_printed_plan_shows_degrees_batch_schedule_stages_and_hash() -> None:
    plan = small_plan(
        pipeline={"degree": 2, "microbatches": 4},
        sharded_data_parallel={"degree": 2, "level": "gradients"},
        tensor_parallel=3,
        precision="bf16",
        activation_checkpointing="full",
    )
    text = str(plan)
    assert text == plan_text(plan)
    assert max(map(len, text.splitlines())) <= WIDTH
    for words in (
        "12 = pp 2 · dp 1 · sdp 2 · cp 1 · tp 3",
        "8 sequences = microbatch size 1 × 4 microbatches × 2 data ranks × accumulation 1",
        "8 sequences × 12 tokens = 96 tokens; 100 steps",
        "1f1b, 4 microbatches, bubble 2",
        "gradients over 2 ranks",
        "bf16",
        "full",
        "257, padded to 264",
        plan.hash,
    ):
        assert words in " ".join(text.split()), words


def test_the_drawn_pass_is_timed_in_forwards_of_the_average_stage() -> None:
    plan = small_plan(pipeline={"degree": 2, "microbatches": 4})
    timeline = plan_timeline(plan)
    assert sum(timeline.busy) == pytest.approx(4 * 2 * 3)  # a backward takes two forwards


def test_stages_of_a_printed_plan_add_up_to_the_model() -> None:
    plan = small_plan(pipeline=4)
    rows = [
        row for line in plan_text(plan).splitlines() if len(row := line.split()) == 5 and row[0].isdigit()
    ]
    assert [row[0] for row in rows] == ["0", "1", "2", "3"]
    parameters = sum(int(row[3].replace(",", "")) for row in rows)
    assert parameters == plan.description.parameters + 257 * 24  # the tied embedding lies on two stages
    assert sum(float(row[4].rstrip("%")) for row in rows) == pytest.approx(100, abs=0.3)


def test_a_printed_plan_ends_with_the_memory_of_each_pipeline_rank() -> None:
    plan = small_plan(pipeline=2)
    rows = plan_text(plan).splitlines()[-2:]
    for memory, row in zip(plan.estimate().memory, rows, strict=True):
        assert row.split()[:3] == ["pp", str(memory.pp), f"{memory.elements:,}"]
        assert row.endswith(memory.peak_at)
