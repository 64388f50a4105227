"""An estimate as text: what the bytes of each rank are for, what it sends, and how it fares on its device."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from mpsdk.report.display import quantity
from mpsdk.report.plan_table import columns, facts_table, page, verdict_facts

if TYPE_CHECKING:
    from mpsdk.estimate import Estimate

_USES = ("parameters", "optimizer", "gradients", "gathered", "activations", "workspace", "buffers", "inputs")
_TITLES = ("weights", "moments", "grads", "gathered", "activations", "workspace", "buffers", "inputs")
_SCALAR = 64  # bytes: a step's few numbers, which no one need read


def estimate_text(estimate: Estimate) -> str:
    """The estimate for a person, without colours, at most 100 columns wide."""
    parts = [
        facts_table(_facts(estimate)),
        columns(("rank", *_TITLES, "peak"), _memory(estimate), padding=2),
    ]
    if messages := list(_messages(estimate)):
        titles = ("rank", "axis", "collective", "messages", "payload", "sent")
        parts.append(columns(titles, messages, left=(1, 2)))
    return page(*parts)


def _facts(estimate: Estimate) -> Iterator[tuple[str, str]]:
    plan = estimate.plan
    spread = " · ".join(f"{axis} {degree}" for axis, degree in plan.degrees._asdict().items() if degree > 1)
    yield (
        "plan",
        f"{plan.hash}: {plan.description.name} on {plan.world_size:,} × {estimate.device}, {spread or 'one rank'}",
    )
    yield (
        "compute",
        f"{quantity(estimate.model_flops)} FLOPs a step, {quantity(estimate.hardware_flops)} with recompute and padding; "
        f"bubble {estimate.timeline.bubble_fraction:.1%} by FLOPs",
    )
    yield from verdict_facts(estimate)
    if estimate.unknown:
        yield "left out", "; ".join(estimate.unknown)


def _rank(estimate: Estimate, pp: int, sdp: tuple[int, int]) -> str:
    """The ranks at these coordinates, by pipeline rank, and by shard where shards differ."""
    first, stop = sdp
    return f"pp {pp}" if stop - first == estimate.plan.degrees.sdp else f"pp {pp}, sdp {first}-{stop - 1}"


def _memory(estimate: Estimate) -> Iterator[tuple[str, ...]]:
    """Bytes at the fullest moment, by what they are for."""
    for memory in estimate.memory:
        held = memory.moments[memory.peak_at]
        yield (
            _rank(estimate, memory.pp, memory.sdp),
            *(f"{quantity(held.get(use, 0))}B" if held.get(use) else "-" for use in _USES),
            f"{quantity(memory.peak)}B",
        )


def _messages(estimate: Estimate) -> Iterator[tuple[str, ...]]:
    """Of a step, by axes and collective."""
    for rank in estimate.messages:
        name = _rank(estimate, rank.pp, rank.sdp)
        for (axes, collective), total in rank.totals().items():
            if total.payload <= _SCALAR * total.messages:
                continue
            yield (
                name,
                ", ".join(axes),
                collective,
                f"{total.messages:,}",
                f"{quantity(total.payload)}B",
                f"{quantity(total.wire)}B",
            )
            name = ""
