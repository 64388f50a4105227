"""Rotary frequencies against the published formulas, feature by feature."""

from __future__ import annotations

import math

import numpy as np
import pytest

from mpsdk.families import Rotary, family_of
from mpsdk.families.rotary import inverse_frequencies
from tests.core.families.configurations import GPT2, LLAMA

SPEC = family_of("llama").spec({**LLAMA, "head_dim": 64})


def frequencies(theta: float, scaling: tuple[str | float, ...] | None) -> list[float]:
    return inverse_frequencies(
        SPEC.model_copy(update={"rotary": Rotary(theta=theta, scaling=scaling)})
    ).tolist()


def test_default_frequencies_fall_geometrically_from_one():
    assert frequencies(1e4, None) == pytest.approx([1e4 ** (-2 * i / 64) for i in range(32)], rel=1e-15)


def test_linear_scaling_divides_every_frequency():
    assert frequencies(1e4, ("linear", 4.0)) == pytest.approx(
        [f / 4 for f in frequencies(1e4, None)], rel=1e-15
    )


def test_llama3_scaling_keeps_short_waves_and_stretches_long_ones():
    factor, low, high, original = 8.0, 1.0, 4.0, 8192.0
    expected: list[float] = []
    for frequency in frequencies(5e5, None):
        wavelength = 2 * math.pi / frequency
        if wavelength < original / high:
            expected.append(frequency)
        elif wavelength > original / low:
            expected.append(frequency / factor)
        else:
            smooth = (original / wavelength - low) / (high - low)
            expected.append((1 - smooth) * frequency / factor + smooth * frequency)
    found = frequencies(5e5, ("llama3", factor, low, high, original))
    assert found == pytest.approx(expected, rel=1e-14)
    assert len({round(a / b, 6) for a, b in zip(found, frequencies(5e5, None), strict=True)}) > 2


def test_frequencies_are_float64_pairs_of_features():
    found = inverse_frequencies(SPEC)
    assert (found.shape, found.dtype) == ((32,), np.float64)


def test_a_model_with_learned_positions_has_no_frequencies():
    with pytest.raises(ValueError, match="gpt2 spec with learned positions"):
        inverse_frequencies(family_of("gpt2").spec(GPT2))
