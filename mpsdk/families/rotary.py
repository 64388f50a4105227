"""Rotary position embedding: the angle by which each pair of features turns per position."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from mpsdk.families.spec import TransformerSpec


def inverse_frequencies(spec: TransformerSpec) -> NDArray[np.float64]:
    """Radians per position, shape (size // 2,), of a spec whose positions are rotary; size is of the features that turn.

    `linear` scaling divides every
    frequency by the factor (Chen et al. 2023, arXiv:2306.15595). `llama3` divides those whose wavelength exceeds the
    original context / low_frequency_factor, keeps those below original / high_frequency_factor, and blends in between.
    """
    if spec.rotary is None:
        raise ValueError(f"a {spec.family} spec with {spec.positions} positions has no rotary frequencies")
    size = spec.rotary.size or spec.head_size
    exponents = np.arange(0, size, 2, dtype=np.float64) / size
    frequencies = spec.rotary.theta**-exponents
    if spec.rotary.scaling is None:
        return frequencies
    kind, *numbers = spec.rotary.scaling
    arguments = [float(number) for number in numbers]
    if kind == "linear":
        (factor,) = arguments
        return frequencies / factor
    if kind == "llama3":
        factor, low, high, original = arguments
        return _llama3(frequencies, factor=factor, low=low, high=high, original=original)
    raise ValueError(f"unknown rotary scaling {kind!r}; known: 'linear', 'llama3'")


def _llama3(
    frequencies: NDArray[np.float64], *, factor: float, low: float, high: float, original: float
) -> NDArray[np.float64]:
    turns = original * frequencies / (2 * math.pi)  # in the original context
    kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return (1 - kept) * frequencies / factor + kept * frequencies
