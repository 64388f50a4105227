"""A plan as text: what is spread over how many ranks, in which order, and how much each stage holds."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from mpsdk.cost import partition_costs
from mpsdk.report.display import quantity

if TYPE_CHECKING:
    from rich.table import Table

    from mpsdk.estimate import DeviceFigures, Estimate
    from mpsdk.plan import Plan
    from mpsdk.schedule import Timeline

WIDTH = 100


def plan_text(plan: Plan, device: str | os.PathLike[str] | DeviceFigures = "gpu") -> str:
    """The plan for a person, without colours, at most `WIDTH` columns wide.

    Args:
        device: what its ranks run on; see `Plan.estimate`.

    Raises:
        ConfigError: the device is not known.
    """
    estimate = plan.estimate(device)
    memory = ("parameters", "in flight", "between steps", "peak", "sent a step", "peak is at")
    return page(
        facts_table([*_facts(plan, estimate), *verdict_facts(estimate), ("plan", plan.hash)]),
        columns(("stage", "pp rank", "blocks", "parameters", "compute"), _stages(plan)),
        columns((f"{estimate.device} bytes", *memory), _bytes(estimate)),
    )


def facts_table(facts: Iterable[tuple[str, str]]) -> Table:
    """Names and what there is to say of each."""
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2, 0, 0))
    for name, value in facts:
        table.add_row(name, Text(value))
    return table


def columns(
    names: Sequence[str], rows: Iterable[tuple[str, ...]], *, left: Sequence[int] = (), padding: int = 3
) -> Table:
    """A table without lines, `padding` blanks between columns; those in `left` are aligned to the left."""
    from rich.table import Table

    table = Table(box=None, padding=(0, padding, 0, 0), pad_edge=False)
    for number, name in enumerate(names):
        table.add_column(name, justify="left" if number in left else "right")
    for row in rows:
        table.add_row(*row)
    return table


def page(*parts: Table) -> str:
    """Tables under each other as text, at most `WIDTH` columns wide."""
    from rich.console import Console

    text = io.StringIO()
    console = Console(file=text, width=WIDTH, color_system=None, legacy_windows=False)
    for number, part in enumerate(parts):
        if number:
            console.print()
        console.print(part)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines())


def verdict_facts(estimate: Estimate) -> Iterator[tuple[str, str]]:
    """Whether the plan fits the device and how long a step takes there, when the device's figures are known."""
    if estimate.figures is None:
        return
    fit, time = estimate.fits(), estimate.step_time()
    verdict = "fits" if fit else "does not fit"
    yield (
        "device",
        f"{estimate.figures.name}: {verdict}, rank {fit.rank} peaks at {quantity(fit.peak)}B "
        f"of {quantity(fit.bytes_per_device)}B",
    )
    yield (
        "step time",
        f"{seconds_text(time.seconds)}, {quantity(time.tokens_per_second)} tokens/s, MFU {time.mfu:.1%}",
    )
    yield "", time.shares


def seconds_text(seconds: float) -> str:
    """Three figures and a unit.

    >>> seconds_text(12.34), seconds_text(0.01234), seconds_text(0.00001234)
    ('12.3 s', '12.3 ms', '12.3 µs')
    """
    for unit in ("s", "ms"):
        if seconds >= 0.9995:
            return f"{seconds:,.0f} {unit}" if seconds >= 999.5 else f"{seconds:.3g} {unit}"
        seconds *= 1000
    return f"{seconds:.3g} µs"


def _facts(plan: Plan, estimate: Estimate) -> Iterator[tuple[str, str]]:
    distribution, training = plan.distribution, plan.training
    model, degrees = plan.description, plan.degrees
    yield (
        "model",
        f"{model.name}, {quantity(model.parameters)} parameters in {_count(len(model.blocks), 'block')}",
    )
    spread = " · ".join(f"{axis} {degree}" for axis, degree in degrees._asdict().items())
    yield "ranks", f"{plan.world_size} = {spread}, placed {plan.placement}; {plan.framework}"
    sequences = _count(training.global_batch, "sequence")
    yield (
        "global batch",
        f"{sequences} = microbatch size {plan.microbatch_size} × {_count(plan.microbatches, 'microbatch', 'es')}"
        f" × {_count(plan.data_size, 'data rank')} × accumulation {training.accumulation}",
    )
    tokens = f"{sequences} × {training.sequence_length} tokens = {plan.tokens_per_step:,} tokens"
    yield "step", f"{tokens}; {_count(training.steps, 'step')}"
    yield "schedule", _schedule(plan, estimate)
    more = estimate.hardware_flops / estimate.model_flops - 1
    again = f", {more:.1%} more with recompute and padding" if more > 0.0005 else ""
    yield "compute", f"{quantity(estimate.model_flops)} FLOPs a step{again}"
    if degrees.sdp > 1:
        sharding = distribution.sharded_data_parallel
        yield "sharding", f"{sharding.level} over {degrees.sdp} ranks, {sharding.prefetch} prefetched"
    if degrees.tp > 1:
        sequence = "with" if distribution.tensor_parallel.sequence_parallel else "without"
        yield "tensor parallel", f"{sequence} sequence parallelism"
    recompute = distribution.activation_checkpointing
    kept = f", keeping {' and '.join(recompute.keep)}" if recompute.mode == "selective" else ""
    offload = ", inputs of blocks in CPU memory" if recompute.offload else ""
    yield "recompute", f"{recompute.mode}{kept}{offload}"
    compiled = "; compiled, activations estimated as if not" if distribution.compile.enabled else ""
    yield "precision", f"{distribution.precision.mode}{compiled}"
    if model.vocab_size:
        padding = (
            f", padded to {plan.padded_vocab_size}" if plan.padded_vocab_size != model.vocab_size else ""
        )
        yield "vocabulary", f"{model.vocab_size}{padding}"


def _schedule(plan: Plan, estimate: Estimate) -> str:
    pipeline = plan.distribution.pipeline
    microbatches = _count(plan.microbatches, "microbatch", "es")
    if plan.degrees.pp == 1:
        return f"{microbatches}, one after another"
    virtual = f", {pipeline.virtual_stages} virtual stages a rank" if pipeline.virtual_stages > 1 else ""
    bubble = estimate.timeline.bubble_fraction
    return f"{pipeline.schedule}{virtual}, {microbatches}, bubble {bubble:.1%} (by FLOPs)"


def plan_timeline(plan: Plan) -> Timeline:
    """One pass over the microbatches as it should run; see `mpsdk.estimate.Estimate.timeline`."""
    return plan.estimate().timeline


def _stages(plan: Plan) -> Iterator[tuple[str, ...]]:
    compute = _stage_compute(plan)
    for stage, (start, stop) in enumerate(plan.stages):
        yield (
            str(stage),
            str(plan.schedule.stage_rank[stage]),
            f"{start}-{stop - 1}" if stop - start > 1 else str(start),
            f"{sum(local.tensor.elements for local in plan.stage_tensors(stage, 0)):,}",
            f"{compute[stage] / sum(compute):.1%}",
        )


def _bytes(estimate: Estimate) -> Iterator[tuple[str, ...]]:
    """Of each rank, by pipeline rank, and by shard where shards differ."""
    for memory, messages in zip(estimate.memory, estimate.messages, strict=True):
        first, stop = memory.sdp
        part = "" if stop - first == estimate.plan.degrees.sdp else f", sdp {first}-{stop - 1}"
        yield (
            f"pp {memory.pp}{part}",
            f"{memory.elements:,}",
            str(memory.in_flight),
            f"{quantity(memory.between_steps)}B",
            f"{quantity(memory.peak)}B",
            f"{quantity(messages.wire)}B",
            memory.peak_at,
        )


def _stage_compute(plan: Plan) -> list[float]:
    """Forward FLOPs of a token in each stage."""
    blocks, embedding, head = partition_costs(plan.description, plan.training.sequence_length)
    compute = [sum(block.compute for block in blocks[start:stop]) for start, stop in plan.stages]
    compute[0] += embedding.compute
    compute[-1] += head.compute
    return compute


def _count(number: int, noun: str, plural: str = "s") -> str:
    return f"{number:,} {noun}{'' if number == 1 else plural}"
