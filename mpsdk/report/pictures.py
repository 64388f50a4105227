"""Pictures of a run, drawn with matplotlib, which is imported when the first one is asked for."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mpsdk.errors import DataError

Axes = Any  # matplotlib leaves its keyword arguments untyped, so strict checking ends at its objects

_INK = "#222222"
_FAINT = "#8a8a8a"
_GRID = "#e6e6e6"
_TRAINING = "#0072b2"  # Okabe and Ito's blue and vermilion, apart for the colour-blind as well
_VALIDATION = "#d55e00"

_SMOOTH_FROM = 60  # points; fewer are shown as they are
_STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.size": 10.0,
    "text.color": _INK,
    "svg.hashsalt": "mpsdk",
}


def loss_curve(
    history: Sequence[Mapping[str, Any]],
    path: str | os.PathLike[str],
    title: str | None = None,
    *,
    unigram_entropy: float | None = None,
) -> tuple[Path, Path]:
    """Draw training loss, validation loss and, below them, the learning rate over the steps of a run.

    Args:
        history: the rows of `run.history`.
        path: where to; written as PNG and as SVG beside each other, whatever its suffix.
        title: above the picture.
        unigram_entropy: in nats a token: the loss of knowing nothing but how frequent each token is, as a reference.

    Returns:
        The paths of the PNG and the SVG.

    Raises:
        DataError: `history` has no row with a loss.
    """
    from matplotlib import rc_context  # pyright: ignore[reportUnknownVariableType]
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    training = _points(history, "loss")
    validation = _points(history, "validation_loss")
    if not training and not validation:
        raise DataError(f"there is no loss to draw: {len(history)} rows, none with a finite loss")
    rates = _points(history, "learning_rate")
    with rc_context(_STYLE):
        figure: Any = Figure(figsize=(8, 4.8 if rates else 4.2), layout="constrained")
        if rates:
            upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[5, 1])
            _learning_rate(lower, rates)
        else:
            upper = lower = figure.subplots()
        _losses(upper, training, validation, unigram_entropy)
        lower.set_xlabel("step", color=_INK)
        lower.xaxis.set_major_locator(MaxNLocator(integer=True))
        lower.xaxis.set_major_formatter("{x:,.0f}")
        steps = [step for step, _ in training + validation]
        if min(steps) == max(steps):
            lower.set_xlim(steps[0] - 1, steps[0] + 1)
        if title:
            upper.set_title(title, loc="left", fontsize=12, fontweight="bold", pad=12)
        png, svg = Path(path).with_suffix(".png"), Path(path).with_suffix(".svg")
        figure.get_layout_engine().set(w_pad=0.12, h_pad=0.1)
        figure.savefig(png, dpi=160)
        figure.savefig(svg, metadata={"Date": None})
    return png, svg


def _points(history: Sequence[Mapping[str, Any]], name: str) -> list[tuple[int, float]]:
    values = [(row["step"], row[name]) for row in history if row.get(name) is not None]
    return [(step, value) for step, value in values if math.isfinite(value)]


def _losses(
    axes: Axes,
    training: list[tuple[int, float]],
    validation: list[tuple[int, float]],
    unigram_entropy: float | None,
) -> None:
    """The curves; the legend tells where each of them ends."""
    if training:
        steps, losses = zip(*training, strict=True)
        smooth = losses
        if len(training) >= _SMOOTH_FROM:
            smooth = _smooth(losses)
            axes.plot(steps, losses, color=_TRAINING, linewidth=0.8, alpha=0.3)
        marker = "o" if len(training) == 1 else None
        label = f"training {smooth[-1]:.3f}"
        axes.plot(steps, smooth, color=_TRAINING, linewidth=1.8, marker=marker, label=label)
    if validation:
        steps, losses = zip(*validation, strict=True)
        points: dict[str, Any] = {"marker": "o", "markersize": 5.5, "markeredgecolor": "white"}
        label = f"validation {losses[-1]:.3f}"
        axes.plot(steps, losses, color=_VALIDATION, linewidth=1.0, label=label, **points)
    if unigram_entropy is not None:
        label = f"unigram entropy {unigram_entropy:.3f}"
        axes.axhline(unigram_entropy, color=_FAINT, linewidth=1.0, dashes=(4, 3), label=label)
    _clean(axes)
    axes.set_ylabel("loss (nats a token)", color=_INK)
    axes.legend(frameon=True, framealpha=1.0, edgecolor="white", loc="upper right")


def _learning_rate(axes: Axes, rates: list[tuple[int, float]]) -> None:
    steps, values = zip(*rates, strict=True)
    axes.fill_between(steps, values, color=_FAINT, alpha=0.2, linewidth=0)
    axes.plot(steps, values, color=_FAINT, linewidth=1.2)
    _clean(axes)
    highest = max(values)
    axes.set_ylim(0, highest * 1.1 or 1)
    axes.set_yticks([0, highest] if highest else [0], ["0", f"{highest:.2g}"] if highest else ["0"])
    axes.tick_params(axis="y", labelsize=8, labelcolor=_FAINT)
    axes.text(
        0.99, 0.92, "learning rate", transform=axes.transAxes, ha="right", va="top", color=_FAINT, fontsize=9
    )


def _clean(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_FAINT)
    axes.tick_params(colors=_FAINT, labelcolor=_INK)
    axes.grid(axis="y", color=_GRID)
    axes.set_axisbelow(True)
    axes.margins(x=0.02)


def _smooth(values: Sequence[float]) -> list[float]:
    """The mean over a window of a thirtieth of the run around each point, which lags behind a falling curve nowhere.

    Towards the ends the window shrinks from both sides.
    """
    reach = max(1, len(values) // 60)
    smooth: list[float] = []
    for index in range(len(values)):
        half = min(reach, index, len(values) - 1 - index)
        window = values[index - half : index + half + 1]
        smooth.append(sum(window) / len(window))
    return smooth
