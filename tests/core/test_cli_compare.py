"""`mpsdk plan` for a device, and with layouts side by side."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mpsdk import Estimator, compare
from mpsdk.estimate import DATASHEETS
from mpsdk.plan import Plan
from mpsdk.report.plan_table import plan_text
from tests.core.command import Mpsdk, Outcome, job_in


def test_plan_says_whether_it_fits_a_device_and_how_long_a_step_takes(
    mpsdk: Mpsdk, job: Path, tmp_path: Path
) -> None:
    plan = Estimator.from_file(job).plan(world_size=2)
    outcome = mpsdk("plan", job, "--world-size", 2, "--device", "h100")
    assert outcome == Outcome(0, f"{plan_text(plan, 'h100')}\n", "")
    assert "h100: fits, rank 0 peaks at" in outcome.out and "tokens/s, MFU" in outcome.out
    own = tmp_path / "mine.json"
    DATASHEETS["laptop"].model_copy(update={"name": "mine", "memory_bytes": 1000}).save(own)
    assert "mine: does not fit" in mpsdk("plan", job, "--world-size", 2, "--device", own).out


def test_as_json_a_device_adds_its_estimate_to_the_plan(mpsdk: Mpsdk, job: Path) -> None:
    command = ("plan", job, "--world-size", 2, "--json", "--device")
    plan = Estimator.from_file(job).plan(world_size=2)
    found = json.loads(mpsdk(*command, "h100").out)
    estimate = plan.estimate("h100")
    assert Plan.from_json(json.dumps(found["plan"])) == plan
    assert found["estimate"] == {
        "device": "h100",
        "peak": estimate.fullest.peak,
        "fits": True,
        "step_time": estimate.step_time().to_dict(),
    }
    kind = json.loads(mpsdk(*command, "cpu").out)["estimate"]
    peak = plan.estimate("cpu").fullest.peak
    assert kind == {"device": "cpu", "peak": peak, "fits": None, "step_time": None}
    unknown = mpsdk(*command, "abacus")
    assert (unknown.code, unknown.out) == (2, "")
    assert "device (got 'abacus')" in unknown.err


def test_plan_speaks_of_the_device_that_the_launcher_would_use(
    mpsdk: Mpsdk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = job_in(tmp_path, launcher={"processes": 2})
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert "cpu bytes" in mpsdk("plan", path).out
    assert "cpu bytes" in mpsdk("plan", path, "--world-size", 2).out
    assert "gpu bytes" in mpsdk("plan", path, "--world-size", 4).out  # no ranks of this machine's
    assert "gpu bytes" in mpsdk("plan", path, "--device", "gpu").out
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    assert "gpu bytes" in mpsdk("plan", path).out


def test_an_unknown_device_is_told_without_a_traceback(mpsdk: Mpsdk, job: Path) -> None:
    outcome = mpsdk("plan", job, "--device", "abacus")
    assert (outcome.code, outcome.out) == (2, "")
    assert "device (got 'abacus'): is no device that is known here" in outcome.err
    assert "Traceback" not in outcome.err


@pytest.fixture
def layouts(tmp_path: Path) -> list[Path]:
    """Files to compare a job with: a distribution, one that two ranks can't have, and another job."""
    two = tmp_path / "stages.yaml"
    two.write_text("pipeline: {degree: 2, microbatches: 2}", encoding="utf-8")
    three = tmp_path / "three.yaml"
    three.write_text("tensor_parallel: 3", encoding="utf-8")
    (tmp_path / "other").mkdir()
    other = job_in(tmp_path / "other", distribution={"sharded_data_parallel": 2})
    return [two, three, other.rename(tmp_path / "shares.yaml")]


def test_compare_puts_layouts_side_by_side_and_says_why_one_is_refused(
    mpsdk: Mpsdk, job: Path, layouts: list[Path]
) -> None:
    options = [option for path in layouts for option in ("--compare", path)]
    outcome = mpsdk("plan", job, "--world-size", 2, "--device", "h100", *options)
    assert (outcome.code, outcome.err) == (0, "")
    lines = outcome.out.splitlines()
    assert max(map(len, lines)) <= 100
    rows = {line.split()[0]: line.split() for line in lines if line}
    assert [rows[name][1] for name in ("job", "stages", "shares")] == ["dp2", "pp2", "sdp2"]
    assert rows["job"][3] == "yes"
    assert rows["three"][1] == "refused:"
    assert "tensor_parallel.degree 3" in " ".join(outcome.out.split())


def test_compare_prints_what_the_python_api_prints(mpsdk: Mpsdk, job: Path, layouts: list[Path]) -> None:
    estimator = Estimator.from_file(job)
    others = {
        "stages": layouts[0],
        "three": {"tensor_parallel": 3},
        "shares": Estimator.from_file(layouts[2]),
    }
    found = compare(estimator, others, world_size=2, device="h100")
    options = [option for path in layouts for option in ("--compare", path)]
    command = ("plan", job, "--world-size", 2, "--device", "h100", *options)
    assert mpsdk(*command).out == f"{found}\n"
    rows = json.loads(mpsdk(*command, "--json").out)
    assert rows == found.to_dict()
    stages = estimator.with_distribution(layouts[0]).plan(2).estimate("h100")
    assert rows[1]["peak"] == stages.fullest.peak
    assert rows[1]["step_time"]["seconds"] == stages.step_time().seconds
    assert rows[1]["sent"]["pp"] == max(
        sum(m.wire for m in r.of_step() if m.axes == ("pp",)) for r in stages.messages
    )
    assert "problems" in rows[2]


def test_compare_without_a_device_has_no_times(mpsdk: Mpsdk, job: Path, layouts: list[Path]) -> None:
    outcome = mpsdk("plan", job, "--world-size", 2, "--compare", layouts[0])
    assert "tokens/s" not in outcome.out and "pp sent" in outcome.out
    rows = json.loads(mpsdk("plan", job, "--world-size", 2, "--compare", layouts[0], "--json").out)
    assert [(row["fits"], row["step_time"]) for row in rows] == [(None, None)] * 2


def test_what_is_of_one_plan_is_refused_beside_a_comparison(mpsdk: Mpsdk, job: Path, tmp_path: Path) -> None:
    outcome = mpsdk("plan", job, "--compare", job, "--save", tmp_path / "plan.json")
    assert (outcome.code, outcome.out) == (2, "")
    assert "are of one plan" in " ".join(outcome.err.replace("│", " ").split())


def test_comparing_a_distribution_that_is_wrong_is_a_row_too(mpsdk: Mpsdk, job: Path, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text("pipline: 2", encoding="utf-8")
    outcome = mpsdk("plan", job, "--world-size", 2, "--compare", wrong)
    assert outcome.code == 0
    assert "did you mean pipeline?" in outcome.out
    missing = mpsdk("plan", job, "--world-size", 2, "--compare", tmp_path / "none.yaml")
    assert missing.code == 2 and "there is no such file" in missing.err
