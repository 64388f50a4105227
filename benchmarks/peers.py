"""mpsdk against what else trains the same model: ratios of speed and of peak memory, in one run.

    python -m benchmarks.peers                          # all, into results/peers.json, docs/performance.md and its picture
    python -m benchmarks.peers --size small dp-2 pp-2   # some, printed only
    python -m benchmarks.peers --update tf-dp-2         # some, in place of their rows in the results and on the page

Every contender starts from the same weights, takes the same batches in fp32, clips at 1.0 and updates by AdamW; their
losses must agree, or there is no result. Contenders whose libraries are not installed are left out, and said to be.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterable, Sequence
from datetime import date
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.arena import Entry, Result, compete
from benchmarks.contenders import missing
from benchmarks.matches import MATCHES, Match
from benchmarks.page import fill, head
from benchmarks.page import row as line
from benchmarks.record import machine, write_json
from benchmarks.sizes import SIZES, Size

RESULT = Path(__file__).parent / "results" / "peers.json"
DOCS = Path(__file__).parents[1] / "docs"
LOSS_TOLERANCE = 1e-4  # relative, after the first turn


def run(match: str, size: Size, rounds: int) -> list[dict[str, Any]]:
    """One row a contender; none where mpsdk itself or everybody else is left out."""
    chosen = MATCHES[match]
    entries = [entry for entry in chosen.entries if _installed(entry)]
    if len(entries) < 2 or entries[0] is not chosen.entries[0]:
        print("  nothing to compare", flush=True)
        return []
    with TemporaryDirectory(prefix="mpsdk-bench-") as directory:
        _write_model(size, directory)
        results = compete(
            entries,
            size,
            world_size=chosen.processes,
            threads=chosen.threads,
            rounds=rounds,
            model=directory,
        )
    return [_row(match, size, chosen, results[0], result) for result in results]


def _installed(entry: Entry) -> bool:
    lacking = missing(entry.make)
    if lacking:
        print(f"  left out: {entry.name}, because {' and '.join(lacking)} can't be found", flush=True)
    return not lacking


def _write_model(size: Size, directory: str) -> None:
    from mpsdk.families import read_model
    from mpsdk.families.describe import describe_spec
    from mpsdk.families.export import export
    from mpsdk.initialise import RandomSource

    spec = read_model(size.config, weights=False).spec
    export(RandomSource(describe_spec(spec), 0), spec, directory, hf_config=size.config)


def _row(match: str, size: Size, chosen: Match, first: Result, result: Result) -> dict[str, Any]:
    difference = abs(result.losses[0] / first.losses[0] - 1)
    if not difference <= LOSS_TOLERANCE:
        raise RuntimeError(f"{result.entry.name} trains something else: its loss is {difference:.1e} off")
    ratios = [theirs / mine for mine, theirs in zip(first.seconds, result.seconds, strict=True)]
    lower, median, upper = statistics.quantiles(ratios, n=4)
    return {
        "match": match,
        "size": size.name,
        "processes": chosen.processes,
        "contender": result.entry.name,
        "tokens_per_second": size.tokens_per_step / statistics.median(result.seconds),
        "speed_ratio": {"median": median, "quartiles": [lower, upper], "rounds": len(ratios)},
        "peak_memory_bytes": result.memory,
        "memory_ratio": result.memory / first.memory,
        "loss_difference": difference,
    }


TITLES = ("size", "match", "contender", "tokens/s", "mpsdk's speed", "quartiles", "peak MiB", "its memory")


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """A row of the table. Ratios: mpsdk's speed over the contender's, the contender's memory over mpsdk's."""
    ratio = row["speed_ratio"]
    lower, upper = ratio["quartiles"]
    own = row["contender"] == MATCHES[row["match"]].entries[0].name
    return (
        row["size"],
        row["match"],
        row["contender"],
        f"{row['tokens_per_second']:,.0f}",
        "" if own else f"{ratio['median']:.2f} ×",
        "" if own else f"{lower:.2f} to {upper:.2f}",
        f"{row['peak_memory_bytes'] / 2**20:,.0f}",
        "" if own else f"{row['memory_ratio']:.2f} ×",
    )


def print_table(rows: Iterable[dict[str, Any]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for number, title in enumerate(TITLES):
        table.add_column(title, justify="left" if number < 3 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*cells(row))
    Console(width=136).print(table)


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """mpsdk's speed over each contender's: the median of rounds, and the middle half of them as a bar."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = [row for row in rows if not row["contender"].startswith("mpsdk")][::-1]
    figure, axes = plt.subplots(figsize=(8, 0.34 * len(shown) + 1.3), layout="constrained")
    for height, row in enumerate(shown):
        lower, upper = row["speed_ratio"]["quartiles"]
        colour = "#2a78b8" if row["size"] == "small" else "#d5762b"
        axes.plot(
            [lower, upper], [height, height], color=colour, linewidth=5, alpha=0.35, solid_capstyle="round"
        )
        axes.plot(row["speed_ratio"]["median"], height, "o", color=colour, markersize=6)
    axes.axvline(1.0, color="#555555", linewidth=1)
    axes.set_yticks(
        range(len(shown)), [f"{row['match']}, {row['size']}: {row['contender']}" for row in shown], fontsize=8
    )
    axes.set_xlabel("speed of mpsdk over the contender's: median and middle half of the rounds", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", alpha=0.3)
    figure.savefig(path)
    plt.close(figure)


def write_page(result: dict[str, Any], page: Path) -> None:
    """The tables of docs/performance.md."""
    found = result["machine"]
    packages = ", ".join(f"{name} {number}" for name, number in found["packages"].items())
    about = f"{found['processor']}, {found['cores']} cores, {found['system']}; Python {found['python']}, {packages}."
    tables = {"machine": [f"Measured on {result['measured_at']}: {about}"]}
    for size in SIZES.values():
        rows = [cells(entry)[1:] for entry in result["rows"] if entry["size"] == size.name]
        tables[size.name] = [*head(*TITLES[1:]), *(line(*shown) for shown in rows)]
    fill(page, tables)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=__doc__)
    parser.add_argument(
        "matches", nargs="*", metavar="MATCH", help=f"of: {', '.join(MATCHES)}; by default all"
    )
    parser.add_argument("--size", choices=SIZES, action="append", help="by default all")
    parser.add_argument("--rounds", type=int, help="3 or more; by default the size's own")
    parser.add_argument(
        "--update", action="store_true", help="put what is measured in place of its rows in peers.json"
    )
    parser.add_argument(
        "--only-docs", action="store_true", help="the picture and the tables again, from peers.json"
    )
    options = parser.parse_args(arguments)
    if unknown := set(options.matches) - set(MATCHES):
        parser.error(f"no match {', '.join(sorted(unknown))}; there are {', '.join(MATCHES)}")
    if options.rounds is not None and options.rounds < 3:
        parser.error(f"--rounds must be 3 or more, and is {options.rounds}")
    whole = not (options.matches or options.size)
    if options.only_docs and not whole:
        parser.error("--only-docs goes alone")
    if options.only_docs:
        result = json.loads(RESULT.read_text(encoding="utf-8"))
    else:
        result = measure(options.size or list(SIZES), options.matches or list(MATCHES), options.rounds)
        print_table(result["rows"])
        if options.update:
            result = updated(json.loads(RESULT.read_text(encoding="utf-8")), result)
    everything = len(SIZES) * sum(len(match.entries) for match in MATCHES.values())
    if not options.update and len(result["rows"]) < everything:
        print("Only a part was measured; nothing was written")
        return
    write_json(RESULT, result)
    draw(result["rows"], DOCS / "pictures" / "peers.svg")
    write_page(result, DOCS / "performance.md")
    print(f"Written: {RESULT}, {DOCS / 'pictures' / 'peers.svg'}, {DOCS / 'performance.md'}")


def updated(before: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """`before` with the rows of the matches and sizes that were measured now. A ratio is of one run, and stays one.

    Raises ValueError when the machines differ.
    """
    for what in ("cores", "processor", "system", "python"):
        if before["machine"][what] != now["machine"][what]:
            raise ValueError(
                f"{what} was {before['machine'][what]} and is {now['machine'][what]}: measure everything anew"
            )
    fresh = {(row["match"], row["size"]) for row in now["rows"]}
    rows = [row for row in before["rows"] if (row["match"], row["size"]) not in fresh] + now["rows"]
    order = [(size, match) for size in SIZES for match in MATCHES]
    rows.sort(key=lambda row: order.index((row["size"], row["match"])))  # stable: contenders keep their order
    packages = before["machine"]["packages"] | now["machine"]["packages"]
    return now | {"machine": now["machine"] | {"packages": packages}, "rows": rows}


def measure(sizes: Sequence[str], matches: Sequence[str], rounds: int | None) -> dict[str, Any]:
    rows: list[dict[str, Any]] = []
    for size in map(SIZES.__getitem__, sizes):
        for match in matches:
            print(f"{match}, {size.name}", flush=True)
            rows += run(match, size, rounds or size.rounds)
    return {"machine": machine(), "measured_at": date.today().isoformat(), "rows": rows}


if __name__ == "__main__":
    main()
