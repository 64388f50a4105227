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
    Two tests of the same product under two optimizers, say, let the turns `start` at 0 and at 1: then no pair is in both.

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


def named(cases: Iterable[str]) -> list[Any]:
    """Parameters for cases that have names."""
    return [pytest.param(case, id=case) for case in cases]


def one_in(count: int, parameters: list[Any]) -> list[Any]:
    """Of the parameters that run by default one in `count`, in a pattern that takes all of what they alternate between; the
    rest is `long`.

    >>> taken = one_in(2, in_turn(["dp2", "tp2", "pp2", "sdp2"], ["gpt2", "llama"]))
    >>> [parameter.id for parameter in taken if not parameter.marks]
    ['dp2-gpt2', 'sdp2-llama']
    """
    default = [parameter for parameter in parameters if not parameter.marks]
    left = {each.id for number, each in enumerate(default) if number % count != number // count % count}
    return [
        pytest.param(*each.values, id=each.id, marks=pytest.mark.long) if each.id in left else each
        for each in parameters
    ]
