"""The pages of measurements say what was measured: their tables are those that the results make."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from benchmarks import page, peers, scaling_report
from benchmarks.sizes import SIZES

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"


def test_the_page_on_performance_shows_the_recorded_results(tmp_path: Path) -> None:
    copy = Path(shutil.copy(ROOT / "docs" / "performance.md", tmp_path))
    result = json.loads((RESULTS / "peers.json").read_text(encoding="utf-8"))
    assert {row["match"] for row in result["rows"]} == set(peers.MATCHES)
    assert {row["size"] for row in result["rows"]} == set(SIZES)
    peers.write_page(result, copy)
    assert copy.read_text() == (ROOT / "docs" / "performance.md").read_text()


def test_the_page_on_scaling_shows_the_recorded_results(tmp_path: Path) -> None:
    copy = Path(shutil.copy(ROOT / "docs" / "scaling.md", tmp_path))
    result = json.loads((RESULTS / "scaling.json").read_text(encoding="utf-8"))
    assert {row["ranks"] for row in result["validation"]} == {1, 2, 4, 8}
    assert max(point["ranks"] for point in result["curves"]) == 4096
    scaling_report.write_tables(result, copy)
    assert copy.read_text() == (ROOT / "docs" / "scaling.md").read_text()


def test_a_page_without_a_tables_mark_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "page.md"
    path.write_text("<!-- table one -->\n\nold\n\n<!-- end -->\n")
    page.fill(path, {"one": page.head("a", "b")})
    assert path.read_text() == "<!-- table one -->\n\n| a | b |\n|---|---|\n\n<!-- end -->\n"
    with pytest.raises(ValueError, match="table two"):
        page.fill(path, {"two": ["new"]})


def test_every_match_has_mpsdk_first_and_contenders_that_are_there() -> None:
    for match in peers.MATCHES.values():
        assert match.entries[0].make == "ours:plan"
        for entry in match.entries:
            module, _, function = entry.make.partition(":")
            source = (ROOT / "benchmarks" / "contenders" / f"{module}.py").read_text()
            assert f"\ndef {function}(seat: Seat)" in source, entry
