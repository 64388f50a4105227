"""Measures what this machine's CPU does in a second, and writes it as device figures: python -m benchmarks.device

With 1, 2, 4 and 8 processes at work at once, as ranks of a training share a machine, each with the threads that the local
launcher gives it: matrix products of the sizes that occur, attention, memory-bound operations, the optimizer's update, the
time that an operation takes beside its work, and gloo's collectives in groups of every size. In fp32.

The file is what `mpsdk plan JOB --device FILE` and `plan.estimate(FILE)` take.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

from benchmarks.ranks import Ranks, threads_of
from benchmarks.record import processor
from mpsdk.backend import Place
from mpsdk.estimate import DeviceFigures
from mpsdk.estimate.devices import Link, MeasuredCollective, Rate, Speeds

RESULT = Path(__file__).parent / "results" / "device.json"
PROCESSES = (1, 2, 4, 8)
# Tokens, features in and out of a matrix product, from the smallest that occurs in a small model to a large one.
PRODUCTS = (
    (128, 128, 128),
    (256, 256, 256),
    (512, 256, 512),
    (1024, 256, 1024),
    (1024, 512, 2048),
    (2048, 1024, 1024),
)
# Rows, heads, length, head size.
ATTENTIONS = ((1, 4, 128, 32), (4, 4, 128, 64), (8, 8, 128, 64), (8, 8, 256, 64))
SMALL, LARGE = 2**12, 2**21  # bytes of a message, between which latency and bandwidth are told apart
SECONDS = 0.08  # how long each thing is repeated


def measure(ranks: Ranks) -> DeviceFigures:
    """The figures of this machine."""
    cores = len(os.sched_getaffinity(0))
    speeds = tuple(_speeds(ranks, processes) for processes in PROCESSES)
    peak = max(rate.per_second for rate in speeds[0].matmul["fp32"])
    return DeviceFigures(
        name=f"{platform.machine()}-{cores}-cores",
        kind="cpu",
        source=f"measured by benchmarks/device.py: {processor()}, {cores} cores, gloo",
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        reserved=0.1,
        peak_flops={"fp32": peak},
        ranks_per_node=PROCESSES[-1],
        cores=cores,
        speeds=speeds,
    )


def _speeds(ranks: Ranks, processes: int) -> Speeds:
    alone = ranks.call(processes, _compute)

    def rates(name: str) -> tuple[Rate, ...]:
        sizes = [tuple(sample[name][number] for sample in alone) for number in range(len(alone[0][name]))]
        return tuple(Rate(size[0][0], statistics.mean(rate for _, rate in size)) for size in sizes)

    def mean(name: str) -> float:
        return statistics.mean(sample[name] for sample in alone)

    collectives: list[MeasuredCollective] = []
    group = 2
    while group <= processes:
        collectives += _links(ranks.call(processes, _communicate, group), group)
        group *= 2
    sends = [row for row in collectives if row.collective == "send"]
    inside = (
        Link(latency=sends[0].latency, bandwidth=sends[0].bandwidth)
        if sends
        else Link(latency=0, bandwidth=1e10)
    )
    return Speeds(
        ranks=processes,
        matmul={"fp32": rates("matmul")},
        attention={"fp32": rates("attention")},
        memory_bandwidth=mean("memory"),
        update_bandwidth=mean("update"),
        kernel_seconds=mean("kernel"),
        inside=inside,
        collectives=tuple(collectives),
    )  # fmt: skip


def _links(samples: list[dict[str, tuple[float, float]]], group: int) -> list[MeasuredCollective]:
    """Latency and bandwidth of each collective from the seconds of a small and of a large message."""
    found: list[MeasuredCollective] = []
    times = {
        "all-gather": group - 1,
        "reduce-scatter": (group - 1) / group,
        "all-reduce": 2 * (group - 1) / group,
        "send": 1,
    }
    for name in samples[0]:
        small, large = (statistics.mean(sample[name][number] for sample in samples) for number in (0, 1))
        wire = times[name] * (LARGE - SMALL) / (group if name == "all-gather" else 1)
        small = min(
            small, 0.95 * large
        )  # noise may hide what few bytes take, but not make more of both than was seen
        bandwidth = wire / (large - small)
        found.append(
            MeasuredCollective.model_validate(
                {"collective": name, "ranks": group, "latency": small, "bandwidth": bandwidth}
            )
        )
    return found


# -- in each process ----------------------------------------------------------------------------------------------------


def _seconds(work: Callable[[], object]) -> float:
    """Seconds of one `work`: the mean, since a process that shares its core is interrupted now and then, not always."""
    work()
    begin, count = time.perf_counter(), 0
    while count < 3 or time.perf_counter() - begin < SECONDS:
        work()
        count += 1
    return (time.perf_counter() - begin) / count


def _compute(place: Place) -> dict[str, Any]:
    """Rates of this process while the others do the same."""
    import torch
    import torch.nn.functional as functional

    torch.manual_seed(0)
    matmul, attention = [], []
    for tokens, width, features in PRODUCTS:
        inputs = torch.randn(tokens, width, requires_grad=True)
        weight = torch.randn(features, width, requires_grad=True)
        gradient = torch.randn(tokens, features)

        def product() -> None:
            functional.linear(inputs, weight).backward(gradient)  # noqa: B023

        flops = 2.0 * tokens * width * features
        matmul.append((flops, 3 * flops / _seconds(product)))
    for rows, heads, length, size in ATTENTIONS:
        query, key, value = (torch.randn(rows, heads, length, size, requires_grad=True) for _ in range(3))
        gradient = torch.randn(rows, heads, length, size)

        def attend() -> None:
            out = functional.scaled_dot_product_attention(query, key, value, is_causal=True)  # noqa: B023
            out.backward(gradient)  # noqa: B023

        flops = 0.5 * 4.0 * rows * heads * length**2 * size
        attention.append((flops, 3.5 * flops / _seconds(attend)))
    return {
        "matmul": matmul,
        "attention": attention,
        "memory": _memory(),
        "update": _update(),
        "kernel": _kernel(),
    }


def _memory() -> float:
    """Bytes a second of a block's memory-bound operations: sum, layer norm and activation, forward and backward."""
    import torch
    import torch.nn.functional as functional

    hidden = torch.randn(1024, 256, requires_grad=True)
    inner = torch.randn(1024, 1024, requires_grad=True)
    scale, shift = torch.ones(256, requires_grad=True), torch.zeros(256, requires_grad=True)

    def work() -> None:
        normal = functional.layer_norm(hidden + hidden, (256,), scale, shift)
        active = functional.gelu(inner, approximate="tanh")
        torch.autograd.backward((normal, active), (normal.detach(), active.detach()))

    moved = 4 * ((3 + 2 + 3 + 3) * hidden.numel() + (2 + 3) * inner.numel())
    return moved / _seconds(work)


def _update() -> float:
    """Bytes a second that fused AdamW reads and writes."""
    import torch

    weights = [torch.zeros(256, 1024, requires_grad=True) for _ in range(8)]
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    optimizer = torch.optim.AdamW(weights, fused=True)
    moved = 28 * sum(weight.numel() for weight in weights)
    return moved / _seconds(optimizer.step)


def _kernel() -> float:
    """Seconds that an operation on next to nothing takes, forward or backward."""
    import torch

    operations = 50
    start = torch.ones(16, requires_grad=True)

    def work() -> None:
        value = start
        for _ in range(operations):
            value = value * 1.0
        value.sum().backward()

    return _seconds(work) / (2 * operations)


def _communicate(place: Place, group_size: int) -> dict[str, tuple[float, float]]:
    """Seconds of a small and of a large message of each collective, in all groups of `group_size` ranks at once."""
    import torch
    import torch.distributed as dist

    dist.init_process_group(
        "gloo",
        init_method=f"file://{place.store}",
        rank=place.rank,
        world_size=place.world_size,
        timeout=timedelta(seconds=60),
    )
    # torch 2.13 renames these two.
    gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
    scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)
    try:
        first = place.rank // group_size * group_size
        groups = [
            dist.new_group(list(range(start, start + group_size)))
            for start in range(0, place.world_size, group_size)
        ]
        group = groups[first // group_size]
        partner = first + (place.rank - first + group_size // 2) % group_size
        found: dict[str, tuple[float, float]] = {}
        for name in ("all-gather", "reduce-scatter", "all-reduce", "send"):
            if name == "send" and group_size > 2:
                continue
            taken: list[float] = []
            for size in (SMALL, LARGE):
                whole, part = torch.zeros(size // 4), torch.zeros(size // 4 // group_size)
                works: dict[str, Callable[[], object]] = {
                    "all-gather": lambda: gather(whole, part, group=group),  # noqa: B023
                    "reduce-scatter": lambda: scatter(part, whole, group=group),  # noqa: B023
                    "all-reduce": lambda: dist.all_reduce(whole, group=group),  # noqa: B023
                    "send": lambda: _exchange(whole, partner, group, place.rank == first),  # noqa: B023
                }
                repetitions = 20 if size == SMALL else 6
                each = _repeated(works[name], repetitions, dist.barrier)
                taken.append(each / 2 if name == "send" else each)
            found[name] = (taken[0], taken[1])
        return found
    finally:
        dist.destroy_process_group()


def _exchange(tensor: Any, partner: int, group: Any, sends: bool) -> None:
    """There and back: two messages one after another."""
    import torch.distributed as dist

    if sends:
        dist.send(tensor, partner, group=group)
        dist.recv(tensor, partner, group=group)
    else:
        dist.recv(tensor, partner, group=group)
        dist.send(tensor, partner, group=group)


def _repeated(work: Callable[[], object], repetitions: int, together: Callable[[], object]) -> float:
    """Seconds of one `work`, which all ranks repeat equally often."""
    work()
    together()
    begin = time.perf_counter()
    for _ in range(repetitions):
        work()
    return (time.perf_counter() - begin) / repetitions


# ------------------------------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=RESULT, help="where the figures go")
    arguments = parser.parse_args()
    with Ranks(PROCESSES[-1]) as ranks:
        figures = measure(ranks)
    arguments.output.parent.mkdir(exist_ok=True)
    figures.save(arguments.output)
    print(f"{figures.name}: {figures.source}; written to {arguments.output}")
    for row in figures.speeds:
        best = max(rate.per_second for rate in row.matmul["fp32"])
        print(
            f"  {row.ranks} processes × {threads_of(row.ranks)} threads: products up to {best / 1e9:.0f} GFLOP/s, "
            f"memory {row.memory_bandwidth / 1e9:.1f} GB/s, an operation {row.kernel_seconds * 1e6:.1f} µs each"
        )
        for link in row.collectives:
            print(
                f"      {link.collective:14} among {link.ranks}: {link.latency * 1e6:6.0f} µs, {link.bandwidth / 1e9:.2f} GB/s"
            )


if __name__ == "__main__":
    main()
