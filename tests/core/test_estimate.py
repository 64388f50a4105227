"""The estimate against published formulas, and what it must say of any plan."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from mpsdk.config import ActivationCheckpointing, Distribution, Training
from mpsdk.description import ModelDescription
from mpsdk.estimate import estimate
from mpsdk.estimate.activations import block_kept, recompute_kept
from mpsdk.estimate.communication import Message
from mpsdk.estimate.frameworks import TORCH_KERNELS, framework_of
from mpsdk.estimate.memory import BETWEEN, GATHERED, GRADIENTS, OPTIMIZER, PARAMETERS
from mpsdk.estimate.sizes import Sizes, sizes_of
from mpsdk.estimate.states import shard_elements, share_classes, stage_units
from mpsdk.families.describe import describe_spec
from mpsdk.families.read import read_model
from mpsdk.plan import Plan
from mpsdk.resolve import resolve

GPT2 = {
    "model_type": "gpt2",
    "vocab_size": 50257,
    "n_positions": 1024,
    "n_embd": 768,
    "n_layer": 12,
    "n_head": 12,
}
LLAMA_70B = {
    "model_type": "llama", "vocab_size": 128256, "max_position_embeddings": 8192, "hidden_size": 8192,
    "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8, "intermediate_size": 28672,
}  # fmt: skip
GPU = TORCH_KERNELS["gpu"]
GIB = 2**30


@pytest.fixture(scope="module", autouse=True)
def backend_without_limits() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mpsdk.resolve.limits_of", lambda framework: lambda *request: [])
        yield


def plan_of(
    model: dict[str, Any] | ModelDescription,
    world_size: int,
    distribution: dict[str, Any],
    *,
    framework: str = "torch",
    **training: Any,
) -> Plan:
    description = model if isinstance(model, ModelDescription) else describe_spec(read_model(model).spec)
    settings = {"global_batch": 32, "sequence_length": 1024, "tokenizer": "bytes", **training}
    return resolve(
        Distribution.parse(distribution),
        description,
        Training(**settings),
        world_size=world_size,
        framework=framework,
    )


# -- activations: Korthikanti et al. 2022 ---------------------------------------------------------------------------


def tokens_times_width(sizes: Sizes) -> int:
    return sizes.tokens * sizes.width


def without_statistics(kept: dict[str, int]) -> int:
    """The paper leaves out what is small against s b h."""
    return sum(size for name, size in kept.items() if not name.endswith(("statistics", "logsumexp")))


def test_a_block_in_bf16_keeps_34_sbh_as_the_paper_says_when_attention_is_fused() -> None:
    plan = plan_of(GPT2, 1, {"precision": "bf16"}, dropout=0.1)
    spec, sizes = plan.description.spec, sizes_of(plan)
    assert spec is not None and sizes is not None
    assert without_statistics(block_kept(spec, sizes, GPU)) == 34 * tokens_times_width(sizes)


@pytest.mark.parametrize("t", [2, 4])
def test_tensor_parallelism_leaves_10_sbh_on_every_rank_and_cuts_24(t: int) -> None:
    whole = {"degree": t, "sequence_parallel": False}
    plan = plan_of(GPT2, t, {"precision": "bf16", "tensor_parallel": whole}, dropout=0.1)
    spec, sizes = plan.description.spec, sizes_of(plan)
    assert spec is not None and sizes is not None
    assert without_statistics(block_kept(spec, sizes, GPU)) == (10 + 24 / t) * tokens_times_width(sizes)


@pytest.mark.parametrize("t", [2, 4])
def test_sequence_parallelism_cuts_all_but_the_gathered_inputs(t: int) -> None:
    """34 / t in the paper, whose layers keep a part of their input and gather it a second time; ours keep all of it."""
    plan = plan_of(GPT2, t, {"precision": "bf16", "tensor_parallel": t}, dropout=0.1)
    spec, sizes = plan.description.spec, sizes_of(plan)
    assert spec is not None and sizes is not None
    assert without_statistics(block_kept(spec, sizes, GPU)) == (30 / t + 4) * tokens_times_width(sizes)


def test_full_recompute_keeps_2_sbh() -> None:
    plan = plan_of(GPT2, 1, {"precision": "bf16", "activation_checkpointing": "full"})
    spec, sizes = plan.description.spec, sizes_of(plan)
    assert spec is not None and sizes is not None
    kept = recompute_kept(spec, sizes, GPU, plan.distribution.activation_checkpointing)
    assert kept == {"input": 2 * tokens_times_width(sizes)}


def test_attention_of_its_parts_keeps_the_weights_of_all_pairs_of_tokens() -> None:
    """On a GPU there is no fused kernel for grouped queries in fp32."""
    grouped = {**LLAMA_70B, "num_hidden_layers": 2}
    found = {}
    for precision in ("fp32", "bf16"):
        plan = plan_of(grouped, 1, {"precision": precision}, global_batch=1)
        found[precision] = estimate(plan).memory_of(0).kept[0]
    assert found["fp32"]["attention.weights"] == 2 * 64 * 1024**2 * 4
    assert "attention.weights" not in found["bf16"]


def test_more_is_kept_the_less_is_computed_again() -> None:
    plan = plan_of(GPT2, 1, {"precision": "bf16"})
    spec, sizes = plan.description.spec, sizes_of(plan)
    assert spec is not None and sizes is not None
    modes = [
        ActivationCheckpointing(mode="full"),
        ActivationCheckpointing(mode="selective", keep=("attention",)),
        ActivationCheckpointing(mode="selective", keep=("attention", "matmul")),
        ActivationCheckpointing(mode="none"),
    ]
    kept = [sum(recompute_kept(spec, sizes, GPU, mode).values()) for mode in modes]
    assert kept == sorted(kept) and len(set(kept)) == 4


def test_offloaded_inputs_of_blocks_lie_in_host_memory() -> None:
    offload = {"mode": "full", "offload": True}
    plan = plan_of(GPT2, 1, {"activation_checkpointing": offload, "pipeline": {"microbatches": 4}})
    memory = estimate(plan).memory_of(0)
    assert memory.host == 12 * 8 * 1024 * 768 * 4  # blocks, rows of a microbatch, length, width, fp32
    assert "input" not in memory.kept[0]


# -- states: ZeRO ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("framework", "level", "parameters", "gradients"),
    [
        ("any", "optimizer", 1, 1),
        ("any", "gradients", 1, 4),
        ("any", "parameters", 4, 4),
        ("torch", "optimizer", 4, 1),  # FSDP2 shares the fp32 weights at every level
        ("torch", "gradients", 4, 4),
        ("torch", "parameters", 4, 4),
    ],
)
def test_a_level_divides_what_it_says(framework: str, level: str, parameters: int, gradients: int) -> None:
    layout = {"sharded_data_parallel": {"degree": 4, "level": level}, "pipeline": {"microbatches": 2}}
    plan = plan_of(GPT2, 4, layout, framework=framework)
    memory = estimate(plan).memory_of(0)
    moment = memory.moments["first backward"]
    whole = 4 * sum(unit.elements for unit in stage_units(plan, 0))
    assert moment[PARAMETERS] == pytest.approx(whole / parameters, rel=1e-3)
    assert moment[GRADIENTS] == pytest.approx(whole / gradients, rel=1e-3)
    assert moment[OPTIMIZER] == pytest.approx(2 * whole / 4, rel=1e-3)


def test_whole_weights_are_a_copy_only_where_something_else_is_updated() -> None:
    def gathered(framework: str, **layout: Any) -> int:
        plan = plan_of(GPT2, 2, {"pipeline": {"microbatches": 2}, **layout}, framework=framework)
        return estimate(plan).memory_of(0).moments["first backward"][GATHERED]

    whole = 4 * sum(unit.elements for unit in stage_units(plan_of(GPT2, 1, {}), 0))
    assert gathered("any") == gathered("torch") == 0
    assert gathered("any", precision="bf16") == gathered("torch", precision="bf16") == whole / 2
    assert 0 < gathered("torch", sharded_data_parallel=2) < whole / 2  # a block or two, embedding and head
    assert gathered("torch", tensor_parallel=2) == 0


@pytest.mark.parametrize("degree", [1, 2, 3, 5, 64, 1000])
def test_shares_add_up_and_are_told_apart(degree: int) -> None:
    units = stage_units(plan_of({**GPT2, "n_layer": 1}, 1, {}), 0)
    held = [sum(unit.shard(sdp, degree) for unit in units) for sdp in range(degree)]
    assert sum(held) == sum(unit.elements for unit in units)
    classes = share_classes(units, degree)
    assert [sdp for share in classes for sdp in range(share.start, share.stop)] == list(range(degree))
    assert [share.elements for share in classes for _ in range(share.start, share.stop)] == held
    assert max(held) == held[0]


def test_a_share_is_cut_as_torch_chunk_cuts() -> None:
    assert [shard_elements((7, 3), sdp, 4) for sdp in range(4)] == [6, 6, 6, 3]
    assert [shard_elements((5,), sdp, 4) for sdp in range(4)] == [2, 2, 1, 0]


# -- the schedule ---------------------------------------------------------------------------------------------------


def test_gpipe_keeps_all_microbatches_and_1f1b_as_many_as_stages() -> None:
    def activations(schedule: str) -> list[int]:
        plan = plan_of(GPT2, 4, {"pipeline": {"degree": 4, "microbatches": 16, "schedule": schedule}})
        return [memory.in_flight for memory in estimate(plan).memory]

    assert activations("gpipe") == [16, 16, 16, 16]
    assert activations("1f1b") == [4, 3, 2, 1]


def test_the_bubble_of_equal_stages_is_the_published_one() -> None:
    description = describe_spec(read_model({**GPT2, "n_layer": 4, "vocab_size": 8, "n_embd": 12}).spec)
    description = description.model_copy(update={"head": ()})
    plan = plan_of(description, 4, {"pipeline": {"degree": 4, "microbatches": 8, "partition": [1, 1, 1, 1]}})
    assert estimate(plan).timeline.bubble_fraction == pytest.approx(3 / (8 + 3))  # (p-1) / (m+p-1)
    assert estimate(plan).bubble == pytest.approx((3 / 11,) * 4)


# -- messages -------------------------------------------------------------------------------------------------------


def test_what_a_ring_sends() -> None:
    message = Message(("tp",), "all-reduce", "", ranks=4, bytes=1000, count=3)
    assert message.payload == 3000
    assert message.wire == 3000 * 2 * 3 / 4
    assert replace(message, collective="reduce-scatter").wire == 3000 * 3 / 4
    assert replace(message, collective="all-gather").wire == 3000 * 3
    assert replace(message, collective="send").wire == 3000


def test_totals_are_by_axes_and_collective() -> None:
    layout = {"pipeline": {"degree": 2, "microbatches": 4}, "sharded_data_parallel": 2, "tensor_parallel": 2}
    messages = estimate(plan_of(GPT2, 8, layout)).messages_of(0)
    totals = messages.totals()
    assert totals[("pp",), "send"].messages == 4
    assert sum(total.payload for total in totals.values()) == messages.payload
    assert sum(total.wire for total in totals.values()) == messages.wire


def test_an_all_reduce_is_a_reduce_scatter_and_an_all_gather() -> None:
    """So sequence parallelism sends no more bytes in a step without recompute (Korthikanti et al. 2022, section 4.2.2)."""

    def wire(sequence_parallel: bool) -> int:
        plan = plan_of(GPT2, 4, {"tensor_parallel": {"degree": 4, "sequence_parallel": sequence_parallel}})
        messages = estimate(plan).messages_of(0).of_step()
        return sum(message.wire for message in messages if message.purpose == "hidden states")

    assert wire(True) == wire(False)


def test_sharing_parameters_gathers_in_every_forward_and_backward() -> None:
    def gathers(level: str) -> Counter[str]:
        layout = {"sharded_data_parallel": {"degree": 4, "level": level}, "pipeline": {"microbatches": 2}}
        messages = estimate(plan_of(GPT2, 4, layout)).messages_of(0).messages
        gathered = [m for m in messages if m.axes == ("sdp",) and m.collective == "all-gather"]
        return Counter({m.purpose: m.count for m in gathered})

    blocks, ends = GPT2["n_layer"], "weights of embedding and head"
    once = {"weights of block": blocks, ends: 1}
    assert gathers("gradients") == gathers("optimizer") == once
    # The last block and the head are whole still when their backward begins, directly after their forward.
    assert gathers("parameters") == {"weights of block": 2 * (2 * blocks - 1), ends: 2}


def test_messages_go_over_axes_of_several_ranks_only() -> None:
    plan = plan_of(GPT2, 1, {"precision": "bf16"})
    assert estimate(plan).messages_of(0).messages == ()


# -- FLOPs ----------------------------------------------------------------------------------------------------------


def test_model_flops_are_six_a_parameter_and_token_and_attention_on_top() -> None:
    plan = plan_of(LLAMA_70B, 1, {}, sequence_length=8192)
    found = estimate(plan)
    parameters = plan.description.parameters - 128256 * 8192  # an embedding is looked up
    attention = 12 * 80 * 8192 * 8192  # PaLM, appendix B: 12 L H Q T a token
    assert found.model_flops == pytest.approx((6 * parameters + attention) * plan.tokens_per_step, rel=1e-4)
    assert found.hardware_flops == pytest.approx(found.model_flops)


def test_full_recompute_adds_nearly_a_forward() -> None:
    plan = plan_of(LLAMA_70B, 1, {"activation_checkpointing": "full"}, sequence_length=8192)
    found = estimate(plan)
    assert 1.2 < found.hardware_flops / found.model_flops < 4 / 3
    whole = estimate(
        plan_of(LLAMA_70B, 1, {"activation_checkpointing": "full"}, framework="any", sequence_length=8192)
    )
    assert whole.hardware_flops / whole.model_flops == pytest.approx(4 / 3, abs=0.01)


def test_flops_of_all_ranks_add_up() -> None:
    layout = {"pipeline": {"degree": 2, "microbatches": 4}, "tensor_parallel": 2, "sharded_data_parallel": 2}
    plan = plan_of(GPT2, 8, layout)
    found = estimate(plan)
    assert sum(found.hardware_flops_of(rank) for rank in range(8)) == pytest.approx(found.hardware_flops)
    padding = 6 * 768 * (plan.padded_vocab_size - 50257) * plan.tokens_per_step
    assert found.hardware_flops - found.model_flops == pytest.approx(padding)


# -- as a whole -----------------------------------------------------------------------------------------------------


def test_fits_names_the_fullest_rank_and_its_moment() -> None:
    layout = {"pipeline": {"degree": 4, "microbatches": 16}, "tensor_parallel": 2}
    plan = plan_of(GPT2, 8, layout, sequence_length=1024)
    found = estimate(plan)
    peaks = [found.memory_of(rank).peak for rank in range(8)]
    worst = found.fits(max(peaks) - 1)
    assert not worst and found.fits(max(peaks))
    assert worst.rank == peaks.index(max(peaks))
    assert (worst.peak, worst.peak_at) == (max(peaks), found.memory_of(worst.rank).peak_at)
    assert f"rank {worst.rank} peaks at {worst.peak:,} bytes" in str(worst)


def test_the_peak_is_the_largest_moment_and_never_below_what_lies_between_steps() -> None:
    memory = estimate(plan_of(GPT2, 2, {"sharded_data_parallel": 2})).memory_of(1)
    assert memory.peak == max(sum(held.values()) for held in memory.moments.values())
    assert memory.between_steps == sum(memory.moments[BETWEEN].values()) < memory.peak


def test_four_thousand_ranks_take_well_under_a_second() -> None:
    layout = {
        "pipeline": {"degree": 16, "microbatches": 32}, "tensor_parallel": 8, "sharded_data_parallel": 32,
        "precision": "bf16", "activation_checkpointing": "full",
    }  # fmt: skip
    plan = plan_of(LLAMA_70B, 4096, layout, global_batch=1024, sequence_length=8192)
    assert plan.schedule.stages == 16
    start = time.perf_counter()
    found = estimate(plan)
    assert found.fits(80 * GIB)
    assert len(found.bubble) == 16
    assert time.perf_counter() - start < 1.0
    assert {found.memory_of(rank).pp for rank in range(0, 4096, 256)} == set(range(16))


def test_an_estimate_is_plain_data() -> None:
    layout = {"pipeline": {"degree": 2, "microbatches": 4}, "sharded_data_parallel": 2}
    found = estimate(plan_of(GPT2, 4, layout))
    again = json.loads(json.dumps(found.to_dict()))
    assert again["plan"] == found.plan.hash
    assert [memory["peak"] for memory in again["memory"]] == [memory.peak for memory in found.memory]
    assert again["messages"][0]["wire"] == found.messages[0].wire


def test_a_model_that_is_known_by_its_tensors_is_estimated_as_far_as_they_say() -> None:
    description = describe_spec(read_model(GPT2).spec).model_copy(update={"spec": None})
    known = estimate(plan_of(GPT2, 2, {"sharded_data_parallel": 2}))
    found = estimate(plan_of(description, 2, {"sharded_data_parallel": 2}))
    assert found.unknown and not known.unknown
    assert found.memory_of(0).elements == known.memory_of(0).elements
    assert found.memory_of(0).peak < known.memory_of(0).peak
    assert found.messages_of(0).payload == known.messages_of(0).payload
    assert found.model_flops < known.model_flops


def test_a_framework_without_a_row_has_the_levels_as_they_are_defined() -> None:
    assert framework_of("any") is framework_of("any other")
    assert len({id(framework_of(name)) for name in ("torch", "tensorflow", "any")}) == 3
