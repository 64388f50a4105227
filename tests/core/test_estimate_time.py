"""The time of a step: hand-computed cases, limits, and what more speed may never do."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from mpsdk.config import Distribution, Training
from mpsdk.errors import ConfigError
from mpsdk.estimate import DATASHEETS, DeviceFigures, StepTime, device_figures
from mpsdk.estimate.communication import Message
from mpsdk.estimate.devices import Link, MeasuredCollective, Rate, Speeds, rate_at
from mpsdk.estimate.links import Links
from mpsdk.families.describe import describe_spec
from mpsdk.families.read import read_model
from mpsdk.plan import Plan
from mpsdk.resolve import resolve
from mpsdk.schedule import Costs, simulate
from mpsdk.topology import Degrees, Topology

WIDTH, BLOCKS, VOCABULARY, LENGTH = 64, 4, 256, 32
MODEL = {
    "model_type": "gpt2", "vocab_size": VOCABULARY, "n_positions": LENGTH, "n_embd": WIDTH, "n_layer": BLOCKS,
    "n_head": 8, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
}  # fmt: skip
PARAMETERS = BLOCKS * (12 * WIDTH**2 + 13 * WIDTH) + (VOCABULARY + LENGTH + 2) * WIDTH
MATRICES = 12 * WIDTH**2 * BLOCKS + VOCABULARY * WIDTH
NEVER = 1e300  # a rate at which nothing takes any time
NOTHING = Link(latency=0.0, bandwidth=NEVER)


def plan_of(world_size: int, distribution: dict[str, Any], **training: Any) -> Plan:
    settings = {"global_batch": 16, "sequence_length": LENGTH, "tokenizer": "bytes", **training}
    return resolve(
        Distribution.parse(distribution),
        describe_spec(read_model(MODEL).spec),
        Training(**settings),
        world_size=world_size,
        framework="torch",
    )


def speeds(ranks: int = 8, **changes: Any) -> Speeds:
    """A device that does everything in no time, but for `changes`."""
    free = {
        "ranks": ranks,
        "matmul": {"fp32": [(1.0, NEVER)], "bf16": [(1.0, NEVER)]},
        "attention": {"fp32": [(1.0, NEVER)], "bf16": [(1.0, NEVER)]},
        "memory_bandwidth": NEVER,
        "update_bandwidth": NEVER,
        "inside": NOTHING,
    }
    return Speeds.model_validate(free | changes)


def figures(
    kind: str = "cpu", *rows: Speeds, between: Link | None = NOTHING, **changes: Any
) -> DeviceFigures:
    values = {
        "name": "made up", "kind": kind, "source": "a test", "memory_bytes": 10**9, "peak_flops": {"fp32": 1e12},
        "ranks_per_node": 8, "speeds": rows or (speeds(),), "between": between, **changes,
    }  # fmt: skip
    return DeviceFigures.model_validate(values)


def time_of(plan: Plan, device: DeviceFigures) -> StepTime:
    return plan.estimate(device).step_time()


LAYOUTS: list[tuple[int, dict[str, Any]]] = [
    (1, {"activation_checkpointing": "full"}),
    (2, {}),
    (4, {"sharded_data_parallel": 4, "pipeline": {"microbatches": 2}}),
    (4, {"tensor_parallel": 4}),
    (4, {"pipeline": {"degree": 4, "microbatches": 8}}),
    (8, {"pipeline": {"degree": 2, "microbatches": 4}, "tensor_parallel": 2, "sharded_data_parallel": 2}),
    (2, {"pipeline": {"degree": 2, "microbatches": 4, "schedule": "zb-h1"}}),
    (16, {"sharded_data_parallel": {"degree": 4, "level": "gradients"}, "tensor_parallel": 2}),
]


# -- compute -----------------------------------------------------------------------------------------------------------


def test_products_alone_take_six_flops_a_parameter_and_token() -> None:
    device = figures("gpu", speeds(matmul={"fp32": [(1.0, 1e9)]}))
    found = time_of(plan_of(1, {}), device)
    assert found.seconds == pytest.approx(6 * MATRICES * 16 * LENGTH / 1e9)
    assert (found.exposed, found.bubble) == ({}, 0)
    assert found.update == pytest.approx(0, abs=1e-290)


def test_causal_attention_takes_half_and_its_backward_five_products_for_two() -> None:
    device = figures("gpu", speeds(attention={"fp32": [(1.0, 1e9)]}))
    forward = 0.5 * 4 * LENGTH * WIDTH * BLOCKS * 16 * LENGTH
    assert time_of(plan_of(1, {}), device).seconds == pytest.approx(3.5 * forward / 1e9)


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "interleaved", "zb-h1", "zb-v"])
def test_without_messages_a_step_is_the_simulation_of_flops_over_rate(schedule: str) -> None:
    virtual = 2 if schedule in ("interleaved", "zb-v") else 1
    pipeline = {"degree": 2, "microbatches": 4, "schedule": schedule, "virtual_stages": virtual}
    plan = plan_of(2, {"pipeline": pipeline})
    rate = 1e9
    linear = [stage.linear / rate for stage in plan.estimate().compute]
    costs = Costs(
        forward=linear, backward=[2 * part for part in linear], backward_input=linear, backward_weight=linear
    )
    found = time_of(plan, figures("gpu", speeds(matmul={"fp32": [(1.0, rate)]})))
    assert found.seconds == pytest.approx(simulate(plan.schedule, costs).makespan)
    assert found.bubble == pytest.approx(found.seconds - 4 * 3 * sum(linear) / 2)


def test_recompute_takes_as_much_longer_as_it_has_more_flops() -> None:
    device = figures("gpu", speeds(matmul={"fp32": [(1.0, 1e9)]}))
    plan = plan_of(1, {"activation_checkpointing": "full"})
    again = plan.estimate().compute[0].linear_again
    assert time_of(plan, device).seconds - time_of(plan_of(1, {}), device).seconds == pytest.approx(
        again / 1e9
    )


def test_small_products_run_at_the_rate_of_their_size() -> None:
    rates = [Rate(1e6, 1e9), Rate(1e8, 1e11)]
    assert [rate_at(rates, flops) for flops in (1.0, 1e6, 1e7, 1e8, 1e12)] == pytest.approx(
        [1e9, 1e9, 1e10, 1e11, 1e11]
    )


def test_an_update_reads_and_writes_28_bytes_a_parameter_and_the_norm_4() -> None:
    adamw = figures("gpu", speeds(update_bandwidth=1e9))
    assert time_of(plan_of(1, {}), adamw).update == pytest.approx(28 * PARAMETERS / 1e9)
    norm = figures("gpu", speeds(memory_bandwidth=1e9))
    assert time_of(plan_of(1, {}), norm).update == pytest.approx(4 * PARAMETERS / 1e9)


def test_a_gpu_launches_while_it_computes_and_a_cpu_does_not() -> None:
    busy = {"matmul": {"fp32": [(1.0, 1e9)]}}
    plan = plan_of(1, {})
    alone = time_of(plan, figures("gpu", speeds(**busy)))
    launching = {
        kind: time_of(plan, figures(kind, speeds(**busy, kernel_seconds=1e-7))) for kind in ("gpu", "cpu")
    }
    assert launching["gpu"].compute == alone.compute
    assert launching["cpu"].compute > alone.compute


# -- messages ----------------------------------------------------------------------------------------------------------


def test_a_cpu_waits_for_every_reduction_over_replicas() -> None:
    link = {"inside": Link(latency=1e-3, bandwidth=1e6)}
    found = time_of(plan_of(2, {}), figures("cpu", speeds(**link)))
    units = BLOCKS + 1  # blocks; embedding and head are one, being tied
    assert found.exposed["dp"] == pytest.approx(units * 2e-3 + 4 * PARAMETERS / 1e6)
    assert found.exposed["scalars"] == pytest.approx(2e-3 + 8 / 1e6)  # the count of tokens
    assert found.seconds == pytest.approx(sum(found.exposed.values()))


def test_a_gpu_waits_for_the_last_reduction_only_as_long_as_compute_hides_the_others() -> None:
    last = 4 * (VOCABULARY + LENGTH + 2) * WIDTH / 1e6  # the embedding's, for which no compute is left
    slow = figures("gpu", speeds(matmul={"fp32": [(1.0, 1e6)]}, inside=Link(latency=0.0, bandwidth=1e6)))
    assert time_of(plan_of(2, {}), slow).exposed["dp"] == pytest.approx(last)
    fast = figures("gpu", speeds(inside=Link(latency=0.0, bandwidth=1e6)))
    assert time_of(plan_of(2, {}), fast).exposed["dp"] == pytest.approx(4 * PARAMETERS / 1e6)


@pytest.mark.parametrize("sequence_parallel", [True, False])
def test_tensor_parallelism_waits_for_all_it_sends(sequence_parallel: bool) -> None:
    plan = plan_of(4, {"tensor_parallel": {"degree": 4, "sequence_parallel": sequence_parallel}})
    found = time_of(plan, figures("gpu", speeds(inside=Link(latency=0.0, bandwidth=1e6))))
    wire = sum(message.wire for message in plan.estimate().messages_of(0).of_step())
    assert sum(found.exposed.values()) == pytest.approx(wire / 1e6)


def test_hops_are_logarithmic_and_a_ring_crosses_machines_over_all_its_adapters() -> None:
    device = figures(
        "gpu",
        speeds(inside=Link(latency=1e-6, bandwidth=100.0)),
        between=Link(latency=1e-3, bandwidth=10.0),
    )
    topology = Topology(Degrees(dp=2, sdp=16))
    links = Links(topology, device, device.at(8))

    def seconds(axes: tuple[str, ...], ranks: int) -> float:
        return links.seconds(Message(axes, "all-gather", "", ranks, 1, 1))

    assert seconds(("sdp",), 16) == pytest.approx(4 * 1e-3 + 15 / 80)  # eight ranks on each machine
    assert seconds(("dp",), 2) == pytest.approx(1e-3 + 1 / 10)  # one
    one_machine = Links(Topology(Degrees(tp=8)), device, device.at(8))
    assert one_machine.seconds(Message(("tp",), "all-reduce", "", 8, 8, 3)) == pytest.approx(
        3 * (6 * 1e-6 + 14 / 100)
    )


def test_a_measured_collective_goes_before_the_link() -> None:
    row = MeasuredCollective(collective="all-reduce", ranks=2, latency=0.5, bandwidth=10.0)
    device = figures("cpu", speeds(collectives=(row,)))
    links = Links(Topology(Degrees(dp=2)), device, device.at(2))
    assert links.seconds(Message(("dp",), "all-reduce", "", 2, 100, 1)) == pytest.approx(0.5 + 10)
    assert links.seconds(Message(("dp",), "all-gather", "", 2, 100, 1)) == 100 / NEVER


def test_messages_between_stages_stand_in_the_simulation() -> None:
    plan = plan_of(2, {"pipeline": {"degree": 2, "microbatches": 4}})
    one = 4 * LENGTH * WIDTH * 4 / 1e6
    found = time_of(plan, figures("gpu", speeds(inside=Link(latency=0.0, bandwidth=1e6))))
    free = Costs(forward=0, backward=0, communication=one)
    tied = 4 * VOCABULARY * WIDTH / 1e6
    assert found.exposed["pp sums"] == pytest.approx(tied)
    assert found.bubble == pytest.approx(simulate(plan.schedule, free).makespan)


# -- as a whole --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("world_size", "layout"), LAYOUTS)
@pytest.mark.parametrize("name", ["h100", "laptop"])
def test_the_parts_add_up(world_size: int, layout: dict[str, Any], name: str) -> None:
    found = time_of(plan_of(world_size, layout), device_figures(name))
    parts = found.compute + sum(found.exposed.values()) + found.bubble + found.update
    assert found.seconds == pytest.approx(parts)
    assert found.tokens_per_second == pytest.approx(16 * LENGTH / found.seconds)
    assert 0 < found.mfu < 1


@pytest.mark.parametrize(("world_size", "layout"), LAYOUTS)
@pytest.mark.parametrize("kind", ["gpu", "cpu"])
def test_no_step_is_longer_for_anything_being_twice_as_fast(
    world_size: int, layout: dict[str, Any], kind: str
) -> None:
    plan = plan_of(world_size, layout)
    base: dict[str, Any] = {
        "matmul": {"fp32": [(1.0, 1e9)]},
        "attention": {"fp32": [(1.0, 1e9)]},
        "memory_bandwidth": 1e8,
        "update_bandwidth": 1e8,
        "kernel_seconds": 1e-5,
        "inside": Link(latency=1e-4, bandwidth=1e7),
    }
    between = Link(latency=1e-3, bandwidth=1e6)
    before = time_of(plan, figures(kind, speeds(**base), between=between)).seconds
    faster: dict[str, Any] = {
        "matmul": {"fp32": [(1.0, 2e9)]},
        "attention": {"fp32": [(1.0, 2e9)]},
        "memory_bandwidth": 2e8,
        "update_bandwidth": 2e8,
        "kernel_seconds": 5e-6,
        "inside": Link(latency=5e-5, bandwidth=2e7),
    }
    for name, value in faster.items():
        changed = figures(kind, speeds(**base | {name: value}), between=between)
        assert time_of(plan, changed).seconds <= before * (1 + 1e-12), name
    twice = figures(kind, speeds(**base | faster), between=Link(latency=5e-4, bandwidth=2e6))
    assert time_of(plan, twice).seconds == pytest.approx(before / 2)


def test_ranks_that_wait_leave_their_core_to_others() -> None:
    """Four stages on two cores: at least the work over the cores, at least the schedule at a core's full speed."""
    plan = plan_of(4, {"pipeline": {"degree": 4, "microbatches": 4}})

    def seconds(crowded: float) -> float:
        rows = (speeds(2, matmul={"fp32": [(1.0, 1e9)]}), speeds(4, matmul={"fp32": [(1.0, crowded)]}))
        return time_of(plan, figures("cpu", *rows, cores=2)).seconds

    work = sum(3 * stage.linear for stage in plan.estimate().compute) * 4 / 4
    own_core = seconds(1e9)
    assert own_core > work / 1e9  # the bubble
    assert seconds(0.99e9) == own_core  # which hides some crowding
    assert seconds(0.25e9) == pytest.approx(work / 0.25e9)  # no bubble is left to hide more


def test_speeds_are_those_measured_with_as_many_ranks_or_the_next_more() -> None:
    device = figures("cpu", *(speeds(ranks) for ranks in (1, 2, 8)))
    assert [device.at(ranks).ranks for ranks in (1, 2, 3, 8, 64)] == [1, 2, 8, 8, 8]


def test_a_gpu_is_a_ranks_own_and_a_machine_is_shared() -> None:
    gpu, cpu = (figures(kind, memory_bytes=1000, reserved=0.1) for kind in ("gpu", "cpu"))
    assert [gpu.usable_memory(world) for world in (1, 4, 64)] == [900, 900, 900]
    assert [cpu.usable_memory(world) for world in (1, 4, 64)] == [900, 225, 112]
    plan = plan_of(2, {})
    peak = plan.estimate("cpu").fullest.peak
    assert plan.estimate(figures("cpu", memory_bytes=2 * peak)).fits()
    assert not plan.estimate(figures("cpu", memory_bytes=2 * peak - 2)).fits()


def test_four_thousand_ranks_are_planned_and_timed_in_well_under_a_second() -> None:
    large = {**MODEL, "n_embd": 8192, "n_layer": 80, "n_head": 64, "n_positions": 4096, "vocab_size": 50257}
    layout = {
        "pipeline": {"degree": 8, "microbatches": 32}, "tensor_parallel": 8, "sharded_data_parallel": 64,
        "precision": "bf16", "activation_checkpointing": "full",
    }  # fmt: skip
    start = time.process_time()
    plan = resolve(
        Distribution.parse(layout),
        describe_spec(read_model(large).spec),
        Training(global_batch=2048, sequence_length=4096, tokenizer="bytes"),
        world_size=4096,
        framework="torch",
    )
    estimate = plan.estimate("h100")
    assert estimate.fits() and 0.05 < estimate.step_time().mfu < 0.6
    assert time.process_time() - start < 1.0


# -- devices -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DATASHEETS)
def test_figures_survive_a_file(name: str, tmp_path: Path) -> None:
    path = tmp_path / "device.json"
    DATASHEETS[name].save(path)
    assert DeviceFigures.from_file(path) == device_figures(str(path)) == DATASHEETS[name]


def test_a_wrong_file_lists_all_its_problems(tmp_path: Path) -> None:
    path = tmp_path / "device.json"
    content = json.loads(DATASHEETS["h100"].model_dump_json())
    content |= {"kind": "tpu", "memory_bytes": 0, "speed": 3}
    path.write_text(json.dumps(content))
    with pytest.raises(ConfigError) as refused:
        device_figures(path)
    assert {problem.field for problem in refused.value.problems} == {"kind", "memory_bytes", "speed"}


@pytest.mark.parametrize("sizes", [(1e6, 1e9, 1e8), (1e6, 1e6)])
def test_rates_whose_sizes_do_not_grow_are_refused(sizes: tuple[float, ...], tmp_path: Path) -> None:
    path = tmp_path / "device.json"
    content = json.loads(DATASHEETS["laptop"].model_dump_json())
    content["speeds"][0]["matmul"]["fp32"] = [[size, 1e10] for size in sizes]
    path.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=r"speeds\.0\.matmul\.fp32.*list sizes once each, smallest first"):
        device_figures(path)


@pytest.mark.parametrize("value", ["Infinity", "NaN"])
def test_figures_that_are_no_number_are_refused(value: str, tmp_path: Path) -> None:
    path = tmp_path / "device.json"
    DATASHEETS["laptop"].save(path)
    path.write_text(path.read_text().replace('"kernel_seconds": 0.00001', f'"kernel_seconds": {value}'))
    assert value in path.read_text()
    with pytest.raises(ConfigError, match="kernel_seconds"):
        device_figures(path)


def test_an_unknown_device_is_told_with_those_that_are_known() -> None:
    with pytest.raises(ConfigError, match=r"h1000.*a100, h100, h200, laptop"):
        plan_of(1, {}).estimate("h1000")


def test_what_needs_figures_says_so() -> None:
    estimate = plan_of(1, {}).estimate("cpu")
    for ask in (estimate.fits, estimate.step_time):
        with pytest.raises(ConfigError, match="only says the kind of device"):
            ask()
    assert estimate.step_time("laptop").seconds > 0
    with pytest.raises(ConfigError, match="has no rates for precision fp16, only for fp32, bf16"):
        plan_of(1, {"precision": "fp16"}).estimate("laptop").step_time()
    with pytest.raises(ConfigError, match="no figures for links between machines"):
        time_of(plan_of(16, {}), figures("gpu", between=None))


def test_a_printed_estimate_is_a_short_table() -> None:
    plan = plan_of(4, {"pipeline": {"degree": 2, "microbatches": 4}, "tensor_parallel": 2})
    text = str(plan.estimate("h100"))
    assert max(map(len, text.splitlines())) <= 100
    assert len(text.splitlines()) < 30
    for words in ("h100: fits", "tokens/s, MFU", "activations", "pp 1", "reduce-scatter"):
        assert words in text, words
    assert "Message(" not in text


def test_an_estimate_with_figures_is_plain_data() -> None:
    again = json.loads(json.dumps(plan_of(2, {}).estimate("h100").to_dict()))
    assert again["fits"]["fits"] is True
    assert again["step_time"]["seconds"] > 0
