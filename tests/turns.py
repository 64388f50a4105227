"""Which cases of a product of settings run by default, and which are `long`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import product
from typing import Any

import pytest


def in_turn(firsts: Iterable[str | tuple[str, ...]], seconds: Sequence[str], *, start: int = 0) -> list[Any]:
    """Parameters for every (first, second); by default each first has one second, the seconds taking turns.

    A whole product takes longer than CI has, and its last cases say the least: what goes wrong goes wrong with one setting,
    or where two of them meet. So every first runs, every second runs with about as many of them, and the rest is `long`.
    Two tests of the same product under two optimizers, say, let the turns `start` at 0 and at 1: then the two together see
    every pair of first and second, of first and optimizer, and of second and optimizer.

    >>> [parameter.id for parameter in in_turn(["dp2", "tp2"], ["gpt2", "llama"]) if not parameter.marks]
    ['dp2-gpt2', 'tp2-llama']
    """
    parameters: list[Any] = []
    for (number, first), (turn, second) in product(enumerate(firsts), enumerate(seconds)):
        values = (*((first,) if isinstance(first, str) else first), second)
        ours = (number + start) % len(seconds) == turn
        marks = () if ours else pytest.mark.long
        parameters.append(pytest.param(*values, marks=marks, id="-".join(values)))
    return parameters
