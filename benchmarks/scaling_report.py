"""The picture and the tables of docs/scaling.md, made from the results of `benchmarks.scaling`; no number is typed by hand."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.page import fill, head
from benchmarks.page import row as line
from mpsdk.report.display import quantity

_INK, _FAINT, _GRID = "#222222", "#8a8a8a", "#e6e6e6"
_COLOURS = ("#0072b2", "#d55e00", "#009e73")  # Okabe and Ito's: apart for the colour-blind as well
_MARKERS = ("o", "s", "D")
_STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.size": 10.0,
    "text.color": _INK,
    "svg.hashsalt": "mpsdk",
}

Points = list[dict[str, Any]]


# -- the picture -------------------------------------------------------------------------------------------------------


def draw(result: dict[str, Any], path: Path) -> None:
    """Weak scaling, strong scaling, and predicted against measured, side by side; `path` with .svg and .png."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    with rc_context(_STYLE):
        figure = Figure(figsize=(13, 4.6), layout=ConstrainedLayoutEngine(w_pad=0.14, h_pad=0.1))
        weak, strong, error = figure.subplots(1, 3, width_ratios=[1.1, 1.1, 0.9])
        if "curves" in result:
            _weak(weak, result["curves"])
            _strong(strong, result["curves"])
        if "validation" in result:
            _predicted(error, result["validation"])
        else:
            error.set_axis_off()
        figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})
        figure.savefig(path.with_suffix(".png"), dpi=130)


def _weak(axes: Any, points: Points) -> None:
    for number, (model, row) in enumerate(_by_model(points, "weak")):
        mfu = [100 * point["time"]["mfu"] for point in row]
        _line(axes, number, [point["ranks"] for point in row], mfu, model)
    _ranks(axes)
    axes.set_ylim(0, 60)
    axes.yaxis.set_major_formatter("{x:.0f}%")
    _titles(axes, "Weak scaling, on paper", "model FLOPs of the peak (MFU); the batch grows with the GPUs")
    axes.legend(frameon=False, loc="lower left")


def _strong(axes: Any, points: Points) -> None:
    for number, (model, row) in enumerate(_by_model(points, "strong")):
        ranks = [point["ranks"] for point in row]
        tokens = [point["time"]["tokens_per_second"] for point in row]
        most = max(rate / n for rate, n in zip(tokens, ranks, strict=True))
        axes.plot(
            ranks, [most * n for n in ranks], color=_COLOURS[number], linewidth=0.9, dashes=(4, 3), alpha=0.6
        )
        _line(axes, number, ranks, tokens, model)
    _ranks(axes)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(_tokens)
    _titles(
        axes,
        "Strong scaling, on paper",
        "tokens a second; the batch stays. Dashed: in proportion to the GPUs",
    )


def _predicted(axes: Any, rows: Points) -> None:
    from matplotlib.ticker import LogLocator, NullLocator

    milliseconds = [1000 * seconds for row in rows for seconds in (row["measured"], row["predicted"])]
    low, high = min(milliseconds) / 1.4, max(milliseconds) * 1.4
    axes.fill_between(
        [low, high], [0.75 * low, 0.75 * high], [1.25 * low, 1.25 * high], color=_GRID, linewidth=0
    )
    axes.plot([low, high], [low, high], color=_FAINT, linewidth=1)
    for number, count in enumerate((1, 2, 4, 8)):
        some = [row for row in rows if row["ranks"] == count]
        axes.plot(
            [1000 * row["measured"] for row in some],
            [1000 * row["predicted"] for row in some],
            linestyle="none",
            marker=("o", "s", "D", "^")[number],
            color=(_INK, *_COLOURS)[number],
            markeredgecolor="white",
            markersize=8,
            label=f"{count} rank{'s' if count > 1 else ''}",
        )
    axes.set(xscale="log", yscale="log", xlim=(low, high), ylim=(low, high))
    axes.set_xlabel("measured, ms a step", color=_INK)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter("{x:,.0f}")
        axis.set_minor_locator(NullLocator())
    _clean(axes)
    _titles(axes, "The model's error, on a CPU", "predicted, ms a step; grey: within a quarter")
    axes.legend(frameon=False, loc="upper left")


def _line(axes: Any, number: int, x: list[int], y: list[float], label: str) -> None:
    look = {"marker": _MARKERS[number], "markersize": 6, "markeredgecolor": "white", "linewidth": 1.8}
    axes.plot(x, y, color=_COLOURS[number], label=label, **look)


def _ranks(axes: Any) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks([8, 32, 128, 512, 2048, 4096], ["8", "32", "128", "512", "2,048", ""])
    axes.minorticks_off()
    axes.set_xlabel("GPUs", color=_INK)
    _clean(axes)


def _tokens(value: float, _: int) -> str:
    for letter in ("", "k", "M", "G"):
        if value < 1000:
            return f"{value:.0f}{letter}"
        value /= 1000
    return f"{value:.0f}T"


def _titles(axes: Any, title: str, below: str) -> None:
    axes.set_title(f"{title}\n", loc="left", fontsize=11, fontweight="bold", color=_INK)
    axes.text(0, 1.02, below, transform=axes.transAxes, fontsize=8.5, color=_FAINT)


def _clean(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_FAINT)
    axes.tick_params(colors=_FAINT, labelcolor=_INK)
    axes.grid(axis="y", color=_GRID)
    axes.set_axisbelow(True)


def _by_model(points: Points, scaling: str) -> Iterator[tuple[str, Points]]:
    """The points at which something fits, of each model in the order of its first point."""
    chosen = [point for point in points if point["scaling"] == scaling]
    for model in dict.fromkeys(point["model"] for point in chosen):
        yield model, [point for point in chosen if point["model"] == model and point["time"]]


# -- the tables --------------------------------------------------------------------------------------------------------


def write_tables(result: dict[str, Any], page: Path) -> None:
    """Replace what stands between the marks of `page`: `<!-- table NAME -->` and `<!-- end -->`."""
    tables = {"machine": [f"{result.get('machine', 'not measured yet')}; {result.get('measured_at', '')}."]}
    if "validation" in result:
        tables["validation"] = list(_validation(result["validation"]))
    if "curves" in result:
        tables["weak"] = list(_scaling(result["curves"], "weak"))
        tables["strong"] = list(_scaling(result["curves"], "strong"))
    fill(page, tables)


def _validation(rows: Points) -> Iterator[str]:
    yield from head("layout", "ranks", "predicted", "measured", "error")
    for row in rows:
        yield line(
            row["layout"],
            row["ranks"],
            f"{1000 * row['predicted']:.0f} ms",
            f"{1000 * row['measured']:.0f} ms",
            f"{row['error']:+.0%}",
        )
    errors = [abs(row["error"]) for row in rows]
    yield ""
    mean, median = statistics.mean(errors), statistics.median(errors)
    yield f"Absolute errors: {mean:.0%} in the mean, {median:.0%} in the median, {max(errors):.0%} at most."


def _scaling(points: Points, scaling: str) -> Iterator[str]:
    yield from head(
        "model", "GPUs", "batch", "layout", "peak", "step", "tokens/s", "MFU", "bubble", "messages"
    )
    for point in points:
        if point["scaling"] != scaling:
            continue
        time, layout = point["time"], point["layout"]
        if not time:
            yield line(
                point["model"], f"{point['ranks']:,}", f"{point['global_batch']:,}", "nothing fits", *[""] * 6
            )
            continue
        axes = " ".join(f"{axis}{layout[axis]}" for axis in ("pp", "dp", "sdp", "tp") if layout[axis] > 1)
        more = ", ".join(
            [
                f"m {layout['microbatches']}",
                *([layout["level"]] if layout["level"] else []),
                layout["recompute"],
            ]
        )
        yield line(
            point["model"],
            f"{point['ranks']:,}",
            f"{point['global_batch']:,}",
            f"{axes}; {more}",
            f"{point['peak'] / 1e9:.0f} GB",
            f"{time['seconds']:.3g} s",
            quantity(time["tokens_per_second"]),
            f"{time['mfu']:.0%}",
            f"{time['bubble'] / time['seconds']:.0%}",
            f"{sum(time['exposed'].values()) / time['seconds']:.0%}",
        )
