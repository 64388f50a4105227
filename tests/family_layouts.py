"""The layouts in which every family and head is trained: one of each kind of parallelism, and mixes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from itertools import product
from typing import Any

import pytest

from tests.cases import EVERY_HEAD

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tp2": (2, {"tensor_parallel": 2}),
    "pp2": (2, {"pipeline": {"degree": 2, "microbatches": 4}}),
    "tp2-no-sequence": (2, {"tensor_parallel": {"degree": 2, "sequence_parallel": False}}),
    "pp2-tp2": (4, {"pipeline": {"degree": 2, "microbatches": 2}, "tensor_parallel": 2}),
    "sdp2": (2, {"sharded_data_parallel": 2}),
    "pp2-tp2-zb-h1-recomputed": (
        4,
        {
            "pipeline": {"degree": 2, "microbatches": 4, "schedule": "zb-h1"},
            "tensor_parallel": 2,
            "activation_checkpointing": "full",
        },
    ),
}

KINDS = ("tp2", "pp2", "pp2-tp2", "sdp2")
_NAMES = [tuple(name.split("-", 1)) for name in EVERY_HEAD]
FAMILIES = tuple(dict.fromkeys(family for family, _ in _NAMES))
OBJECTIVES = tuple(dict.fromkeys(objective for _, objective in _NAMES))


def every_family_in_every_kind() -> set[tuple[str, str]]:
    """A pairwise cover: each family, and each objective, in each of `KINDS`; and each family in one of the other layouts."""
    found: set[tuple[str, str]] = set()
    seen: Counter[tuple[str, str]] = Counter()
    others = [layout for layout in LAYOUTS if layout not in KINDS]
    for number, family in enumerate(FAMILIES):
        for layout in (*KINDS, others[number % len(others)]):
            objectives = [objective for name, objective in _NAMES if name == family]
            objective = min(objectives, key=lambda each: seen[each, layout])
            seen[objective, layout] += 1
            found.add((f"{family}-{objective}", layout))
    return found


def every_objective_in_every_kind() -> set[tuple[str, str]]:
    """A smaller cover: each objective in each of `KINDS`, and each family somewhere."""
    found: set[tuple[str, str]] = set()
    used: Counter[str] = Counter()
    for layout, objective in product(KINDS, OBJECTIVES):
        having = [family for family, head in _NAMES if head == objective]
        family = min(having, key=lambda each: used[each])
        used[family] += 1
        found.add((f"{family}-{objective}", layout))
    return found


def marked(default: Collection[tuple[str, str]]) -> list[Any]:
    """The whole product of heads and layouts; what is not in `default` is `long`."""
    return [
        pytest.param(
            name, layout, marks=() if (name, layout) in default else pytest.mark.long, id=f"{name}-{layout}"
        )
        for name, layout in product(EVERY_HEAD, LAYOUTS)
    ]
