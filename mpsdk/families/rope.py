"""Rotary settings in Hugging Face configurations.

transformers 5 writes `rope_parameters`, transformers 4 wrote `rope_theta` and `rope_scaling`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from mpsdk.families.fields import Fields
from mpsdk.families.spec import Rotary, TransformerSpec

# The numbers that a kind of scaling takes, in the order of `Rotary.scaling`; all are required, save the last of llama3.
SCALING: Mapping[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
SHARED = ("type", "rope_type", "rope_theta", "partial_rotary_factor")


class Partial(NamedTuple):
    """The share of a head's features that turn, beside `rope_parameters` in older files."""

    field: str
    default: float
    head_size: int


def read_rope(
    fields: Fields,
    *,
    default_theta: float,
    max_positions: int,
    theta_field: str = "rope_theta",
    partial: Partial | None = None,
) -> Rotary:
    """The rotary settings of a configuration in either version's form; its problems are left with `fields`.

    As in transformers, a `rope_scaling` comes before `rope_parameters`, and a `rope_theta` inside one of these before the
    one beside it, which older files call `theta_field`. `partial`: of a family in whose heads a part of the features turns.
    """
    beside = fields.positive(theta_field, default_theta)
    if partial is None:
        fields.only("partial_rotary_factor", 1.0, "all features of a head turn")
    share_beside = 1.0 if partial is None else fields.positive(partial.field, partial.default)
    older, newer = fields.mapping("rope_scaling"), fields.mapping("rope_parameters")
    where = "rope_scaling" if older else "rope_parameters"
    given = older or newer or {}
    if not fields.sound("rope_scaling", "rope_parameters"):
        return Rotary(theta=default_theta)

    rope = Fields(given, path=f"model.{where}")
    theta = rope.positive("rope_theta", beside)
    if partial is None:
        rope.only("partial_rotary_factor", 1.0, "all features of a head turn")
    share = 1.0 if partial is None else rope.positive("partial_rotary_factor", share_beside)
    rope.unused("type", "rope_type")
    spelling = "rope_type" if given.get("rope_type") is not None else "type"
    kind = rope.choice(spelling, {name: name for name in SCALING}, "default")
    numbers = {name: rope.positive(name, 1.0) for name in SCALING[kind]}
    for name in SCALING[kind]:
        if given.get(name) is not None:
            continue
        if name == "original_max_position_embeddings":
            numbers[name] = float(max_positions)
        else:
            rope.problem(name, f"is needed by rope_type {kind!r}")
    if kind == "llama3" and rope.sound("low_freq_factor", "high_freq_factor"):
        low, high = numbers["low_freq_factor"], numbers["high_freq_factor"]
        if high <= low:
            rope.problem("high_freq_factor", f"must be greater than low_freq_factor = {low:g}")
    if rope.sound(spelling):
        rope.refuse_unread(SHARED)
    size = None if partial is None else _size(rope, share, partial.head_size)
    fields.problems.extend(rope.problems)
    return Rotary(theta=theta, size=size, scaling=(kind, *numbers.values()) if numbers else None)


def _size(rope: Fields, share: float, head_size: int) -> int | None:
    """How many features of a head turn; None: all."""
    size = int(head_size * share)
    if share > 1.0 or size < 2 or size % 2:
        remedy = f"makes {size} of a head's {head_size} features turn; it must be an even number of them"
        rope.problem("partial_rotary_factor", remedy, got=share)
        return None
    return None if size == head_size else size


def write_rope(spec: TransformerSpec) -> dict[str, object]:
    """`rope_parameters` as transformers 5 writes it."""
    if spec.rotary is None:
        return {}
    parameters: dict[str, object] = {"rope_type": "default", "rope_theta": spec.rotary.theta}
    if spec.rotary.size is not None:
        share = spec.rotary.size / spec.head_size
        exact = int(spec.head_size * share) == spec.rotary.size
        parameters["partial_rotary_factor"] = share if exact else (spec.rotary.size + 0.5) / spec.head_size
    if spec.rotary.scaling is not None:
        kind, *numbers = spec.rotary.scaling
        parameters["rope_type"] = kind
        parameters.update(zip(SCALING[str(kind)], numbers, strict=True))
        original = parameters.get("original_max_position_embeddings")
        if isinstance(original, float):
            parameters["original_max_position_embeddings"] = round(original)
    return parameters
