"""Whole runs through the facade: real processes, real text, and the faults that a user meets first."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from mpsdk import Estimator
from mpsdk.checkpoint import find
from mpsdk.errors import CheckpointError, ConfigError, WorkerError
from mpsdk.launch import LocalLauncher
from mpsdk.run import Run

pytestmark = pytest.mark.processes
ROOT = Path(__file__).parents[2]
TEXT = ROOT / "examples" / "data" / "shakespeare" / "sonnets.txt"
MODEL = {
    "model_type": "gpt2", "vocab_size": 257, "n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 4,
    "embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0, "bos_token_id": 256, "eos_token_id": 256,
}  # fmt: skip
TRAINING = {
    "steps": 8, "global_batch": 8, "sequence_length": 32, "learning_rate": 3e-3, "tokenizer": "bytes", "log_every": 1,
}  # fmt: skip
PP2_TP2 = {"pipeline": {"degree": 2, "microbatches": 4}, "tensor_parallel": 2}


def estimator(
    output_dir: Path, distribution: dict[str, Any], *, launcher: Any = "local", **training: Any
) -> Estimator:
    return Estimator(
        MODEL,
        distribution={"checkpoint": {"every": 4}} | distribution,
        training=TRAINING | training,
        launcher=launcher,
        output_dir=output_dir,
    )


def losses(run: Run) -> list[float]:
    return [row["loss"] for row in run.history if "loss" in row]


def no_process_left(output_dir: Path) -> bool:
    """Whether no worker of the run in `output_dir` is alive: its job file is an argument of each (Linux)."""
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if str(output_dir).encode() in (process / "cmdline").read_bytes():
                return False
    return True


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Pipeline 2 x tensor 2, eight steps with checkpoints at 4 and 8."""
    return estimator(tmp_path_factory.mktemp("finished"), PP2_TP2).fit(train=TEXT, validation=0.05)


def test_a_run_learns_and_leaves_history_checkpoints_and_pictures(finished: Run) -> None:
    assert len(losses(finished)) == 8
    assert losses(finished)[-1] < losses(finished)[0] - 0.5
    assert [Path(path).name for path in find(finished.output_dir / "checkpoints")] == [
        "step-00000008",
        "step-00000004",
    ]
    pictures = {path.name for path in (finished.output_dir / "pictures").iterdir()}
    assert {"loss.png", "loss.svg"} <= pictures


def test_the_export_has_the_runs_validation_loss_in_transformers(finished: Run, tmp_path: Path) -> None:
    finished.export(tmp_path / "export")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "export").eval()
    evaluated = finished.evaluate(TEXT)
    tokens = torch.tensor([*TEXT.read_bytes(), 256])
    length = TRAINING["sequence_length"]
    used = (len(tokens) - 1) // length * length
    with torch.no_grad():
        logits = model(tokens[:used].view(-1, length)).logits.flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits, tokens[1 : used + 1]).item()
    assert evaluated["tokens"] == used
    assert evaluated["loss"] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(PP2_TP2, id="same layout"),
        pytest.param({"sharded_data_parallel": 2}, marks=pytest.mark.long, id="sdp2"),
    ],
)
def test_a_run_that_was_cut_off_goes_on_from_its_last_checkpoint(
    finished: Run, layout: dict[str, Any], tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "tests.torch.faulty_worker", "kill", "1", "6"]
    with pytest.raises(WorkerError):
        estimator(tmp_path, PP2_TP2, launcher=LocalLauncher(command=command)).fit(train=TEXT, validation=0.05)
    run = estimator(tmp_path, layout).fit(train=TEXT, validation=0.05)
    exactly = layout == PP2_TP2
    assert losses(run) == (losses(finished) if exactly else pytest.approx(losses(finished), rel=1e-5))
    assert no_process_left(tmp_path)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        pytest.param(
            "raise", r"(?s)rank 1.*ArithmeticError: planted: the rank's own message", marks=pytest.mark.long
        ),
        ("kill", r"(?s)rank 1.*SIGKILL"),
        ("hang", r"(?s)rank 1.*step 2: a planted wait"),
    ],
)
def test_a_fault_ends_the_run_in_seconds_with_its_cause_on_top(
    fault: str, message: str, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "tests.torch.faulty_worker", fault, "1", "2"]
    launcher = LocalLauncher(command=command, timeout=20.0)
    job = estimator(tmp_path, PP2_TP2, launcher=launcher)
    started = time.monotonic()
    with pytest.raises(WorkerError) as caught:
        job.fit(train=TEXT)
    assert re.search(message, str(caught.value)), str(caught.value)
    assert "rank 1" in str(caught.value).splitlines()[0]
    assert time.monotonic() - started < 90, "starting four processes takes most of it"
    assert no_process_left(tmp_path)


def test_a_world_of_the_wrong_size_is_refused_before_any_process_starts(tmp_path: Path) -> None:
    job = estimator(tmp_path, PP2_TP2, launcher=LocalLauncher(processes=3))
    with pytest.raises(ConfigError) as caught:
        job.fit(train=TEXT)
    assert "world_size (got 3)" in str(caught.value)
    assert "= 4" in str(caught.value)
    assert not (tmp_path / "logs").exists()


@pytest.mark.long
def test_a_truncated_checkpoint_is_named_and_an_older_one_is_used(finished: Run, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(finished.output_dir, tmp_path / "run")
    newest = tmp_path / "run" / "checkpoints" / "step-00000008"
    file = max(newest.glob("*.safetensors"), key=lambda path: path.stat().st_size)
    os.truncate(file, file.stat().st_size // 2)
    with pytest.raises(CheckpointError) as caught:
        estimator(tmp_path / "other", PP2_TP2).fit(train=TEXT, validation=0.05, resume=str(newest))
    assert file.name in str(caught.value)
    assert "step-00000004" in str(caught.value), "the older checkpoint that is intact"
    run = estimator(tmp_path / "run", PP2_TP2).fit(train=TEXT, validation=0.05)
    assert losses(run) == losses(finished)


SCRIPT = """
import sys
from tests.torch.test_run import PP2_TP2, TEXT, estimator
from pathlib import Path
run = estimator(Path(sys.argv[1]), PP2_TP2).fit(train=TEXT, validation=0.05)
"""


def test_the_same_script_runs_unchanged_under_torchrun(finished: Run, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT, encoding="utf-8")
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4", "--local-addr", "127.0.0.1",
        str(script), str(tmp_path / "run"),
    ]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    assert losses(Run.load(tmp_path / "run")) == losses(finished)
