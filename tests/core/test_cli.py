"""The command line: what each command prints, where, and with which exit code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mpsdk import Estimator, __version__
from mpsdk.checkpoint import Checkpoint
from mpsdk.config import Distribution, Job, Training
from mpsdk.plan import Plan
from tests.core.checkpoint.samples import save
from tests.core.command import Mpsdk, Outcome, job_in
from tests.core.jobs import TRAINING, order_in

# -- plan --------------------------------------------------------------------------------------------------------------


def test_plan_prints_what_the_python_api_prints(mpsdk: Mpsdk, job: Path) -> None:
    plan = Estimator.from_file(job).plan(world_size=2)
    assert mpsdk("plan", job, "--world-size", 2) == Outcome(0, f"{plan}\n", "")


def test_plan_takes_the_world_that_the_launcher_would_start(mpsdk: Mpsdk, tmp_path: Path) -> None:
    path = job_in(tmp_path, distribution={"pipeline": 2}, launcher={"processes": 4})
    assert json.loads(mpsdk("plan", path, "--json").out)["world_size"] == 4


def test_plan_as_json_and_saved_are_the_same_plan(mpsdk: Mpsdk, job: Path, tmp_path: Path) -> None:
    saved = tmp_path / "plan.json"
    outcome = mpsdk("plan", job, "--world-size", 2, "--json", "--save", saved)
    assert (outcome.code, outcome.err) == (0, "")
    assert Plan.from_json(outcome.out) == Plan.load(saved) == Estimator.from_file(job).plan(world_size=2)


@pytest.mark.parametrize(("name", "start"), [("s.svg", b"<?xml"), ("s.png", b"\x89PNG")])
def test_plan_draws_the_schedule(mpsdk: Mpsdk, tmp_path: Path, name: str, start: bytes) -> None:
    path = job_in(tmp_path, distribution={"pipeline": {"degree": 2, "microbatches": 4}})
    outcome = mpsdk("plan", path, "--world-size", 2, "--schedule-picture", tmp_path / name)
    assert (outcome.code, outcome.err) == (0, "")
    assert (tmp_path / name).read_bytes().startswith(start)


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--schedule-picture", "s.pdf", "must end in .svg or .png"),
        ("--schedule-picture", "no/such/s.svg", "there is no directory no/such"),
        ("--save", "no/such/plan.json", "there is no directory no/such"),
        ("--world-size", "two", "Invalid value for '--world-size'"),
    ],
)
def test_a_wrong_option_of_plan_is_told_before_anything_is_planned(
    mpsdk: Mpsdk, job: Path, option: str, value: str, said: str
) -> None:
    outcome = mpsdk("plan", job, option, value)
    assert (outcome.code, outcome.out) == (2, "")
    assert said in " ".join(outcome.err.replace("│", " ").split())


def test_every_mistake_of_a_job_file_is_told_without_a_traceback(mpsdk: Mpsdk, tmp_path: Path) -> None:
    path = job_in(tmp_path, distribution={"pipline": 2}, training={"steps": "3"})
    outcome = mpsdk("plan", path)
    assert outcome.code == 2
    assert outcome.out == ""
    assert outcome.err.splitlines()[0] == f"2 problems in {path}:"
    assert "distribution.pipline (got 2): unknown key; did you mean pipeline?" in outcome.err
    assert "training.steps (got '3'): must be an integer >= 1; write it without quotes" in outcome.err
    assert "Traceback" not in outcome.err


def test_what_a_plan_refuses_is_told_without_a_traceback(mpsdk: Mpsdk, tmp_path: Path) -> None:
    outcome = mpsdk("plan", job_in(tmp_path, distribution={"tensor_parallel": 2}), "--world-size", 3)
    assert (outcome.code, outcome.out) == (2, "")
    assert "world_size (got 3)" in outcome.err
    assert "Traceback" not in outcome.err


def test_a_missing_job_file_is_told(mpsdk: Mpsdk) -> None:
    outcome = mpsdk("plan", "no-such-job.yaml")
    assert outcome.code == 2
    assert "there is no such file, looking from" in outcome.err


def test_plan_imports_no_framework(job: Path) -> None:
    code = (
        "import sys\nfrom mpsdk.cli import main\n"
        f"try: main(['plan', {str(job)!r}, '--world-size', '2'])\n"
        "except SystemExit as ended: assert not ended.code, ended.code\n"
        "print(sorted({'torch', 'tensorflow', 'keras', 'transformers', 'matplotlib'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"


# -- run ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def on_fake_backend(fake: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job file names the frameworks that ship; here it runs on the numpy backend all the same."""
    read = Estimator.from_file

    def from_file(path: str | os.PathLike[str]) -> Estimator:
        estimator = read(path)
        object.__setattr__(estimator, "framework", "fake")
        return estimator

    monkeypatch.setattr(Estimator, "from_file", from_file)


@pytest.mark.usefixtures("on_fake_backend")
def test_run_trains_as_the_job_file_says_and_resume_overrides_it(
    mpsdk: Mpsdk, tmp_path: Path, job: Path
) -> None:
    outcome = mpsdk("run", job)
    assert (outcome.code, outcome.err) == (0, "")
    assert "8" in outcome.out
    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000008"
    assert Checkpoint.open(str(checkpoint)).step == 8
    assert mpsdk("checkpoint", "verify", checkpoint) == Outcome(0, f"{checkpoint}: intact\n", "")
    again = mpsdk("run", job, "--resume", "never")
    assert again.code == 2
    assert "resume (got 'never')" in again.err
    assert "Traceback" not in again.err


@pytest.mark.usefixtures("on_fake_backend")
def test_a_script_is_refused_with_what_would_do(mpsdk: Mpsdk) -> None:
    outcome = mpsdk("run", "train.py")
    assert outcome.code == 2 and "training scripts of your own can't be run yet" in outcome.err


@pytest.mark.usefixtures("on_fake_backend")
def test_a_failed_run_ends_with_1_and_the_root_cause(mpsdk: Mpsdk, tmp_path: Path, job: Path) -> None:
    diverging = {**TRAINING, "learning_rate": 1e30, "log_every": 1, "steps": 50}
    outcome = mpsdk("run", job_in(tmp_path, training=diverging))
    assert outcome.code == 1
    assert "diverged" in outcome.err


@pytest.mark.usefixtures("on_fake_backend")
def test_unusable_data_ends_with_1(mpsdk: Mpsdk, tmp_path: Path) -> None:
    outcome = mpsdk("run", job_in(tmp_path, data="no-such-text.txt"))
    assert outcome.code == 1
    assert "no-such-text.txt" in outcome.err
    assert "Traceback" not in outcome.err


# -- checkpoints -------------------------------------------------------------------------------------------------------


def damage(checkpoint: str, name: str = "rank-00000.safetensors") -> None:
    path = Path(checkpoint, name)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_inspect_prints_the_summary_of_a_checkpoint(mpsdk: Mpsdk, tmp_path: Path) -> None:
    path = save(tmp_path, 7)
    assert mpsdk("checkpoint", "inspect", path) == Outcome(0, f"{Checkpoint.open(path).describe()}\n", "")


def test_inspect_lists_tensors_with_shape_and_slots(mpsdk: Mpsdk, tmp_path: Path) -> None:
    outcome = mpsdk("checkpoint", "inspect", save(tmp_path, 7), "--tensors")
    rows = [line.split() for line in outcome.out.splitlines()]
    assert ["blocks.0.up.weight", "5", "×", "3", "weight,", "exp_avg_sq,", "exp_avg"] in rows
    assert ["head.norm.weight", "4", "weight"] in rows


def test_inspect_as_json_is_plain_data(mpsdk: Mpsdk, tmp_path: Path) -> None:
    path = save(tmp_path, 7)
    content = json.loads(mpsdk("checkpoint", "inspect", path, "--json").out)
    assert content == Checkpoint.open(path).describe().model_dump(mode="json")
    with_tensors = json.loads(mpsdk("checkpoint", "inspect", path, "--json", "--tensors").out)
    assert with_tensors.pop("shapes")["weight"]["blocks.0.up.weight"] == [5, 3]
    assert with_tensors == content


def test_inspect_lists_the_checkpoints_of_a_directory_newest_first_in_whole_lines(
    mpsdk: Mpsdk, tmp_path: Path
) -> None:
    long_name = tmp_path / ("a-long-name-" * 12)
    paths = [save(long_name, step) for step in (5, 1000)]
    outcome = mpsdk("checkpoint", "inspect", long_name)
    rows = [line.split() for line in outcome.out.splitlines() if "step-" in line]
    assert [row[:3] for row in rows] == [[paths[1], "1,000", "8,000"], [paths[0], "5", "40"]]
    assert all("torch, sdp 2" in " ".join(row) for row in rows)
    as_json = json.loads(mpsdk("checkpoint", "inspect", long_name, "--json").out)
    assert [summary["step"] for summary in as_json] == [1000, 5]


def test_a_checkpoint_that_cannot_be_opened_does_not_hide_the_others(mpsdk: Mpsdk, tmp_path: Path) -> None:
    good, bad = save(tmp_path, 5), save(tmp_path, 6)
    damage(bad, "manifest.json")
    outcome = mpsdk("checkpoint", "inspect", tmp_path)
    assert outcome.code == 1
    assert good in outcome.out and bad not in outcome.out
    assert f"checkpoint {bad} cannot be opened" in outcome.err


def test_verify_says_which_checkpoints_are_intact_and_what_is_wrong_with_the_rest(
    mpsdk: Mpsdk, tmp_path: Path
) -> None:
    good, bad, worse = (save(tmp_path, step) for step in (5, 6, 7))
    damage(bad)
    damage(worse, "manifest.json")
    outcome = mpsdk("checkpoint", "verify", tmp_path)
    assert (outcome.code, outcome.out) == (1, f"{good}: intact\n")
    assert f"checkpoint {bad} is damaged" in outcome.err
    assert f"checkpoint {worse} cannot be opened" in outcome.err
    assert "Traceback" not in outcome.err


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_a_runs_directory_stands_for_its_checkpoints(mpsdk: Mpsdk, tmp_path: Path, command: str) -> None:
    run = tmp_path / "run"
    order_in(run).save(run / "job.json")
    outcome = mpsdk("checkpoint", command, run)
    assert outcome.code == 1 and f"the run in {run} has no checkpoint yet" in outcome.err
    path = save(run / "checkpoints", 7)
    outcome = mpsdk("checkpoint", command, run)
    assert outcome.code == 0 and path in outcome.out


@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_a_path_that_does_not_exist_is_told_as_such(mpsdk: Mpsdk, tmp_path: Path, command: str) -> None:
    outcome = mpsdk("checkpoint", command, tmp_path / "nothing")
    assert outcome == Outcome(1, "", f"there is nothing at {tmp_path / 'nothing'}\n")


@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_a_place_without_checkpoints_ends_with_1(mpsdk: Mpsdk, tmp_path: Path, command: str) -> None:
    outcome = mpsdk("checkpoint", command, tmp_path)
    assert (outcome.code, outcome.out) == (1, "")
    assert "there is no manifest.json in it" in outcome.err


# -- schema, help and the rest -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "document"),
    [((), Job), (("job",), Job), (("distribution",), Distribution), (("training",), Training)],
)
def test_schema_prints_the_schema(mpsdk: Mpsdk, arguments: tuple[str, ...], document: type[Job]) -> None:
    outcome = mpsdk("schema", *arguments)
    assert outcome.code == 0
    assert json.loads(outcome.out) == document.json_schema()


def test_the_version_is_told(mpsdk: Mpsdk) -> None:
    assert mpsdk("--version") == Outcome(0, f"mpsdk {__version__}\n", "")


def test_help_names_every_command(mpsdk: Mpsdk) -> None:
    outcome = mpsdk("--help")
    assert outcome.code == 0
    assert all(command in outcome.out for command in ("plan", "run", "checkpoint", "schema"))
    assert mpsdk("checkpoint", "--help").code == 0


@pytest.mark.parametrize(
    "arguments", [("paln",), ("plan",), ("schema", "plan"), ("run", "job.yaml", "--steps", "3")]
)
def test_a_wrong_command_line_ends_with_2_and_says_what_is_there(
    mpsdk: Mpsdk, arguments: tuple[str, ...]
) -> None:
    outcome = mpsdk(*arguments)
    assert (outcome.code, outcome.out) == (2, "")
    assert "--help" in outcome.err


def test_the_command_is_quick_to_say_what_it_can() -> None:
    code = (
        "import sys\nfrom mpsdk.cli import main\n"
        "try: main(['schema', 'training'])\nexcept SystemExit: pass\n"
        "print(sorted({'numpy', 'yaml', 'fsspec', 'torch'} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stderr.strip() == "[]"


def test_the_module_runs_as_a_program(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mpsdk.cli", "plan", "nowhere.yaml"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=tmp_path,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines()[0] == "1 problem in nowhere.yaml:"
