"""Whole runs of the facade, on the numpy backend in processes of their own and in place."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from mpsdk import Estimator, Run, Training
from mpsdk.errors import CheckpointError, ConfigError, DataError, WorkerError
from mpsdk.launch import LocalLauncher
from mpsdk.launch.local import alone_in
from mpsdk.report.callbacks import Callback
from mpsdk.report.plan_table import plan_text
from tests.core.fake_backend import FakeBackend
from tests.core.jobs import MODEL, TEXT, TRAINING


def estimator_in(directory: Path, **arguments: Any) -> Estimator:
    """The small job on the fake backend; `arguments` replace its own, those of `training` one by one."""
    training = {**TRAINING, **arguments.pop("training", {})}
    return Estimator(
        **{
            "model": MODEL,
            "framework": "fake",
            "training": training,
            "launcher": LocalLauncher(timeout=60),
            "output_dir": directory / "run",
            **arguments,
        }
    )


@pytest.fixture
def corpus(tmp_path: Path) -> str:
    path = tmp_path / "corpus.txt"
    path.write_text(TEXT, encoding="utf-8")
    return str(path)


class Told(Callback):
    """Keeps what it is told, and may ask for a stop at one step."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.stop_at = stop_at
        self.events: list[tuple[str, int]] = []

    def on_start(self, event: dict[str, Any]) -> None:
        self.events.append(("start", event["step"]))

    def on_log(self, row: dict[str, Any]) -> str | None:
        self.events.append(("log", row["step"]))
        return "stop" if row["step"] == self.stop_at else None

    def on_evaluate(self, row: dict[str, Any]) -> None:
        self.events.append(("evaluate", row["step"]))

    def on_checkpoint(self, event: dict[str, Any]) -> None:
        self.events.append(("checkpoint", event["step"]))

    def on_end(self, event: dict[str, Any]) -> None:
        self.events.append((event["reason"], event["step"]))


# -- fit -----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("fake")
def test_fit_trains_on_processes_of_its_own(
    tmp_path: Path, corpus: str, capsys: pytest.CaptureFixture[str]
) -> None:
    told = Told()
    estimator = estimator_in(
        tmp_path, distribution={"sharded_data_parallel": 2, "checkpoint": 4}, callbacks=[told]
    )
    run = estimator.fit(train=corpus, validation=0.2)
    assert [row["step"] for row in run.history if "loss" in row] == [1, 2, 4, 6, 8]
    assert run.history[-1].keys() == {"step", "validation_loss", "validation_perplexity"}
    assert run.latest_checkpoint is not None and run.latest_checkpoint.endswith("step-00000008")
    assert run.plan == estimator.plan(world_size=2)
    assert {"loss.png", "loss.svg"} <= {picture.name for picture in run.pictures}
    assert told.events == [
        ("start", 0),
        ("log", 1),
        ("log", 2),
        ("log", 4),
        ("checkpoint", 4),
        ("log", 6),
        ("log", 8),
        ("evaluate", 8),
        ("checkpoint", 8),
        ("finished", 8),
    ]
    assert plan_text(run.plan, estimator.device(2)) in capsys.readouterr().out


@pytest.mark.usefixtures("fake")
def test_a_callback_stops_a_run_and_the_next_fit_goes_on(tmp_path: Path, corpus: str) -> None:
    slow = {"steps": 3000, "log_every": 1}
    stopped = estimator_in(tmp_path, training=slow, callbacks=[Told(stop_at=2)]).fit(corpus)
    step = stopped.history[-1]["step"]
    assert 2 < step < 3000
    told = Told()
    estimator_in(tmp_path, training={"steps": step + 2, "log_every": 1}, callbacks=[told]).fit(corpus)
    assert told.events[0] == ("start", step)
    assert told.events[-1] == ("finished", step + 2)


@pytest.mark.usefixtures("fake")
def test_what_is_wrong_with_the_data_is_said_before_a_worker_starts(tmp_path: Path, corpus: str) -> None:
    estimator = estimator_in(tmp_path)
    with pytest.raises(ConfigError) as caught:
        estimator.fit({"train": corpus, "test": corpus, "validation": 0.1}, validation=0.2)
    assert {problem.field for problem in caught.value.problems} == {"data.test", "data.validation"}
    with pytest.raises(ConfigError, match=r"data\.train"):
        estimator.fit()
    with pytest.raises(ConfigError, match="between 0 and 1"):
        estimator.fit(corpus, validation=1.5)
    with pytest.raises(DataError, match="no-such-file"):
        estimator.fit(str(tmp_path / "no-such-file.txt"))
    with pytest.raises(DataError, match="too few"):
        estimator.fit([1, 2, 3])
    assert not (tmp_path / "run" / "logs").exists()


@pytest.mark.usefixtures("fake")
def test_a_model_without_a_tokenizer_is_planned_but_not_trained(tmp_path: Path, corpus: str) -> None:
    estimator = estimator_in(tmp_path, training={"tokenizer": "auto"})
    assert estimator.plan(world_size=1).world_size == 1
    with pytest.raises(ConfigError, match=r"training\.tokenizer"):
        estimator.fit(corpus)


@pytest.mark.usefixtures("fake")
def test_a_checkpoint_that_does_not_fit_is_refused_before_a_worker_starts(
    tmp_path: Path, corpus: str
) -> None:
    estimator_in(tmp_path, training={"steps": 1}).fit(corpus)
    for logs in (tmp_path / "run" / "logs").iterdir():
        logs.unlink()
    with pytest.raises(CheckpointError, match=r"shape \[257, 8\], and the model's has \[257, 16\]"):
        estimator_in(tmp_path, model={**MODEL, "n_embd": 16}).fit(corpus)
    with pytest.raises(ConfigError, match="holds checkpoints up to step 1"):
        estimator_in(tmp_path).fit(corpus, resume="never")
    with pytest.raises(CheckpointError, match="nowhere"):
        estimator_in(tmp_path).fit(corpus, resume=str(tmp_path / "nowhere"))
    assert list((tmp_path / "run" / "logs").iterdir()) == []


@pytest.mark.usefixtures("fake")
def test_a_workers_error_comes_back_with_its_rank(tmp_path: Path, corpus: str) -> None:
    estimator = estimator_in(tmp_path, training={"learning_rate": 1e30, "log_every": 1, "steps": 50})
    with pytest.raises(WorkerError, match=r"rank 0 of 1 failed.*training has diverged"):
        estimator.fit(corpus)


@pytest.mark.usefixtures("fake")
def test_fit_without_waiting_comes_back_at_once(tmp_path: Path, corpus: str) -> None:
    run = estimator_in(tmp_path).fit(corpus, wait=False)
    assert run.latest_checkpoint is None
    assert run.wait().latest_checkpoint is not None
    failing = estimator_in(tmp_path / "b", training={"learning_rate": 1e30, "log_every": 1, "steps": 50})
    failed = failing.fit(corpus, wait=False)
    with pytest.raises(WorkerError, match="diverged"):
        failed.wait()


@pytest.mark.usefixtures("fake")
def test_a_wait_that_is_interrupted_stops_the_run_with_a_checkpoint(tmp_path: Path, corpus: str) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        f"""
import os, signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where a shell started the tests in the background
from mpsdk import Estimator
from mpsdk.report.callbacks import Callback
from mpsdk.report.plan_table import plan_text
class Interrupt(Callback):
    def on_log(self, row):
        if row["step"] == 1:
            os.kill(os.getpid(), signal.SIGINT)
training = {{**{TRAINING!r}, "steps": 10**9, "log_every": 500}}
Estimator(
    {MODEL!r}, framework="fake", training=training, callbacks=[Interrupt()], output_dir={str(tmp_path / "run")!r}
).fit({corpus!r}, wait=False).wait()
""",
        encoding="utf-8",
    )
    ended = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=60, check=False
    )
    assert "KeyboardInterrupt" in ended.stderr
    run = Run.load(tmp_path / "run")
    assert run.latest_checkpoint is not None
    assert f"checkpoint {run.latest_checkpoint}" in ended.stdout.splitlines()[-1]


@pytest.mark.usefixtures("fake")
def test_a_run_that_has_all_its_steps_says_so_and_starts_no_worker(
    tmp_path: Path, corpus: str, capsys: pytest.CaptureFixture[str]
) -> None:
    finished = estimator_in(tmp_path).fit(corpus)
    for log in (tmp_path / "run" / "logs").iterdir():
        log.unlink()
    capsys.readouterr()
    again = estimator_in(tmp_path, training={"steps": 7}).fit(corpus)
    said = capsys.readouterr().out
    assert said.startswith(f"nothing to train: {tmp_path / 'run'} is at step 8 already, of 7 (checkpoint ")
    assert "training.steps" in said and "output_dir" in said
    assert list((tmp_path / "run" / "logs").iterdir()) == []
    assert (again.history, again.plan) == (finished.history, finished.plan)


@pytest.mark.usefixtures("fake")
def test_a_second_fit_leaves_the_job_of_a_run_under_way_alone(tmp_path: Path, corpus: str) -> None:
    busy = estimator_in(tmp_path)
    busy.fit(corpus)
    before = (tmp_path / "run" / "job.json").read_bytes()
    with alone_in(tmp_path / "run"), pytest.raises(WorkerError, match="another launcher is at work"):
        estimator_in(tmp_path, training={"steps": 99}).fit(corpus)
    assert (tmp_path / "run" / "job.json").read_bytes() == before


@pytest.mark.usefixtures("fake")
def test_an_interrupted_fit_says_what_the_next_one_goes_on_from(
    tmp_path: Path, corpus: str, capsys: pytest.CaptureFixture[str]
) -> None:
    class Interrupted(LocalLauncher):
        def run(self, *arguments: Any, **options: Any) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        estimator_in(tmp_path, launcher=Interrupted()).fit(corpus)
    assert capsys.readouterr().out.endswith("interrupted before the first checkpoint\n")
    newest = estimator_in(tmp_path).fit(corpus).latest_checkpoint
    with pytest.raises(KeyboardInterrupt):
        estimator_in(tmp_path, training={"steps": 9}, launcher=Interrupted()).fit(corpus)
    assert capsys.readouterr().out.endswith(f"interrupted; run it again to go on from {newest}\n")


@pytest.mark.usefixtures("fake")
def test_an_output_directory_that_cannot_be_made_is_told_as_such(tmp_path: Path, corpus: str) -> None:
    with pytest.raises(ConfigError, match=r"output_dir .*can't be made"):
        estimator_in(tmp_path, output_dir=Path(corpus, "run")).fit(corpus)


@pytest.mark.usefixtures("fake")
def test_a_job_file_says_what_fit_is_not_told(
    tmp_path: Path, corpus: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = {
        "model": MODEL,
        "training": TRAINING,
        "data": {"train": corpus, "validation": corpus},
        "output_dir": str(tmp_path / "run"),
        "resume": "never",
    }
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(job))
    estimator = Estimator.from_file(path)
    assert estimator.training == Training.parse(TRAINING)
    object.__setattr__(estimator, "framework", "fake")  # a job file names the frameworks that ship
    run = estimator.fit()
    assert run.history[-1]["step"] == 8 and "validation_loss" in run.history[-1]
    with pytest.raises(ConfigError, match="holds checkpoints up to step 8"):
        estimator.fit()


@pytest.mark.usefixtures("fake")
def test_a_damaged_checkpoint_that_is_passed_over_is_a_warning_here(
    tmp_path: Path, corpus: str, caplog: pytest.LogCaptureFixture
) -> None:
    job = {"distribution": {"checkpoint": 4}, "training": {"steps": 8}}
    run = estimator_in(tmp_path, **job).fit(corpus)
    assert run.latest_checkpoint is not None
    for file in Path(run.latest_checkpoint).glob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:-1])
    estimator_in(tmp_path, **job).fit(corpus)
    assert "step-00000008 is damaged and passed over" in caplog.text


# -- in place ------------------------------------------------------------------------------------------------------


def test_where_a_launcher_started_the_process_fit_works_in_place(
    tmp_path: Path, corpus: str, fake: type[FakeBackend], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    told = Told()
    estimator = estimator_in(tmp_path, callbacks=[told])
    run = estimator.fit(corpus, validation=0.2)
    assert fake.reads == [1, 2, 4, 6, 8]  # it trained here
    assert told.events[-1] == ("finished", 8)
    assert not (tmp_path / "run" / "logs").exists()
    assert run.evaluate(corpus)["loss"] == pytest.approx(run.history[-1]["validation_loss"], rel=0.1)


@pytest.mark.usefixtures("fake")
def test_ranks_in_place_agree_also_on_what_is_wrong(tmp_path: Path, corpus: str) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        f"""
from mpsdk import Estimator
from mpsdk.errors import DataError
estimator = Estimator({MODEL!r}, framework="fake", training={TRAINING!r}, output_dir={str(tmp_path / "run")!r})
try:
    estimator.fit("missing.txt")
except DataError as error:
    print("refused:", error)
run = estimator.fit({corpus!r})
print("trained", run.plan.world_size, run.history[-1]["step"], run.evaluate({corpus!r})["tokens"])
"""
    )
    ranks = [
        subprocess.Popen(
            [sys.executable, str(script)],
            env={
                **os.environ,
                "RANK": str(rank),
                "WORLD_SIZE": "2",
                "MPSDK_GENERATION": "here",
                "MPSDK_STORE": str(tmp_path / "store"),
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    for rank in ranks:
        output = rank.communicate(timeout=60)[0]
        assert rank.returncode == 0, output
        assert "refused: " in output and "missing.txt" in output
        assert "trained 2 8 2" in output
