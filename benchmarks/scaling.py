"""Scaling: curves on paper to 4,096 GPUs, and how far the model is off on this machine. python -m benchmarks.scaling

Measures this machine (`benchmarks.device`), predicts the step of a small GPT-2 in several layouts of 1, 2, 4 and 8 ranks and
runs each (`benchmarks.validation`), and looks for the fastest layouts of three models on H100s (`benchmarks.paper`). Writes
results/device.json, results/scaling.json, the picture docs/pictures/scaling.svg, and the tables of docs/scaling.md. On two
cores that nobody else uses it takes a few minutes.

    --only paper|validation    one half; the other stays as it was measured last
    --only docs                neither: the picture and the tables again, from results/scaling.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import device
from benchmarks.paper import curves
from benchmarks.ranks import Ranks
from benchmarks.record import write_json
from benchmarks.scaling_report import draw, write_tables
from benchmarks.validation import validate
from mpsdk.estimate import device_figures

RESULT = Path(__file__).parent / "results" / "scaling.json"
DOCS = Path(__file__).parents[1] / "docs"
GPU = "h100"


def measured() -> dict[str, Any]:
    """This machine's figures, and each layout's prediction and measurement."""
    with Ranks(device.PROCESSES[-1]) as ranks:
        figures = device.measure(ranks)
        found = validate(ranks, figures)
    figures.save(device.RESULT)
    print(f"{figures.source}\n{'layout':24}{'ranks':>6}{'predicted':>12}{'measured':>12}{'error':>8}")
    for row in found:
        print(f"{row.layout:24}{row.ranks:6}{row.predicted:10.3f} s{row.measured:10.3f} s{row.error:+8.0%}")
    print(f"mean of absolute errors: {statistics.mean(abs(row.error) for row in found):.0%}")
    return {
        "machine": figures.source,
        "measured_at": time.strftime("%Y-%m-%d", time.gmtime()),
        "validation": [row.to_dict() for row in found],
    }


def on_paper() -> dict[str, Any]:
    """Weak and strong scaling of three models."""
    figures = device_figures(GPU)
    points = curves(figures)
    print(
        f"{len(points)} points on {figures.name}; the slowest plan took {max(p.planned for p in points):.2f} s"
    )
    return {"device": figures.name, "source": figures.source, "curves": [point.to_dict() for point in points]}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=("paper", "validation", "docs"), help="do not do the rest")
    only = parser.parse_args(arguments).only
    begin = time.perf_counter()
    result: dict[str, Any] = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    if only in (None, "validation"):
        result |= measured()
    if only in (None, "paper"):
        result |= on_paper()
    RESULT.parent.mkdir(exist_ok=True)
    write_json(RESULT, result)
    draw(result, DOCS / "pictures" / "scaling")
    write_tables(result, DOCS / "scaling.md")
    print(f"{RESULT}, {DOCS / 'pictures' / 'scaling.svg'} and {DOCS / 'scaling.md'} written", end="")
    print(f" after {time.perf_counter() - begin:.0f} s")


if __name__ == "__main__":
    main()
