"""The pages of measurements say what was measured: their tables are those that the results make."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from benchmarks import contenders, page, peers, scaling_report
from benchmarks.arena import Entry, Result
from benchmarks.matches import MATCHES
from benchmarks.sizes import SIZES

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"


def test_the_page_on_performance_shows_the_recorded_results(tmp_path: Path) -> None:
    copy = Path(shutil.copy(ROOT / "docs" / "performance.md", tmp_path))
    result = json.loads((RESULTS / "peers.json").read_text(encoding="utf-8"))
    assert {row["match"] for row in result["rows"]} == set(MATCHES)
    assert {row["size"] for row in result["rows"]} == set(SIZES)
    peers.write_page(result, copy)
    assert copy.read_text() == (ROOT / "docs" / "performance.md").read_text()


def test_a_part_that_is_measured_again_takes_the_place_of_its_rows() -> None:
    before = json.loads((RESULTS / "peers.json").read_text(encoding="utf-8"))
    again = [row | {"peak_memory_bytes": 1} for row in before["rows"] if row["match"] == "dp-2"]
    result = peers.updated(before, before | {"rows": again})
    kept = [row for row in result["rows"] if row["match"] != "dp-2"]
    assert [row for row in result["rows"] if row["match"] == "dp-2"] == again
    assert kept == [row for row in before["rows"] if row["match"] != "dp-2"]
    other = before["machine"] | {"cores": before["machine"]["cores"] + 1}
    with pytest.raises(ValueError, match="measure everything anew"):
        peers.updated(before, before | {"machine": other})


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
    for match in MATCHES.values():
        assert match.entries[0].make in ("ours:plan", "ours_tf:plan")
        assert len({entry.name for entry in match.entries}) == len(match.entries)
        for entry in match.entries:
            module, _, function = entry.make.partition(":")
            source = (ROOT / "benchmarks" / "contenders" / f"{module}.py").read_text()
            assert f"\ndef {function}(seat: Seat)" in source, entry


def test_tensorflow_is_measured_beside_its_own_and_beside_pytorch_under_the_same_plan() -> None:
    for plan in ("single", "dp-2", "dp-4", "sdp-2", "tp-2", "pp-2"):
        first, *others = MATCHES[f"tf-{plan}"].entries
        assert (first.make, others[-1].make) == ("ours_tf:plan", "ours:plan")
        assert first.options == others[-1].options
    for name, match in MATCHES.items():
        compiled = [entry for entry in match.entries if "XLA" in entry.name]
        assert bool(compiled) is name.endswith("-xla")
        for entry in compiled:
            settings = entry.options.get("distribution", entry.options)
            assert isinstance(settings, dict) and settings["compile"] is True


def test_contenders_whose_libraries_are_not_installed_are_left_out_by_name(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    installed = {"tensorflow", "keras"}
    monkeypatch.setattr(contenders, "find_spec", lambda name: name if name in installed else None)
    asked: list[str] = []

    def compete(entries: list[Entry], *_: object, **__: object) -> list[Result]:
        asked.extend(entry.name for entry in entries)
        return [Result(entry, seconds=[1.0, 2.0, 4.0], losses=[9.0], memory=2**20) for entry in entries]

    monkeypatch.setattr(peers, "compete", compete)
    rows = peers.run("tf-dp-2", SIZES["small"], 3)
    assert asked == [row["contender"] for row in rows] == ["mpsdk, TensorFlow", "MultiWorkerMirroredStrategy"]
    assert "left out: mpsdk, PyTorch, because torch can't be found" in capsys.readouterr().out

    assert peers.run("dp-2", SIZES["small"], 3) == []
    out = capsys.readouterr().out
    assert "left out: DDP, because torch and transformers can't be found" in out
    assert "nothing to compare" in out
