"""Whole runs through the facade: real processes, real text, and the faults that a user meets first."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mpsdk import Estimator
from mpsdk.checkpoint import find
from mpsdk.errors import CheckpointError, ConfigError, WorkerError
from mpsdk.launch import LocalLauncher
from mpsdk.run import Run
from mpsdk_tf import from_pretrained

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
PP2 = {"pipeline": {"degree": 2, "microbatches": 4}}
TP2 = {"tensor_parallel": 2}


def estimator(
    output_dir: Path, distribution: dict[str, Any], *, launcher: Any = "local", **training: Any
) -> Estimator:
    return Estimator(
        MODEL,
        framework="tensorflow",
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


def faulty(*arguments: object, timeout: float = 600.0) -> LocalLauncher:
    command = [sys.executable, "-m", "tests.tf.faulty_worker", *map(str, arguments)]
    return LocalLauncher(command=command, timeout=timeout)


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
    assert no_process_left(finished.output_dir)


def test_the_export_has_the_runs_validation_loss_as_a_keras_model(finished: Run, tmp_path: Path) -> None:
    finished.export(tmp_path / "export")
    model = from_pretrained(tmp_path / "export")
    evaluated = finished.evaluate(TEXT)
    tokens = np.array([*TEXT.read_bytes(), 256])
    length = TRAINING["sequence_length"]
    used = (len(tokens) - 1) // length * length
    logits = np.asarray(model.predict(tokens[:used].reshape(-1, length), verbose=0), np.float64)
    labels = tokens[1 : used + 1].reshape(-1, length)
    highest = logits.max(-1)
    total = np.log(np.exp(logits - highest[..., None]).sum(-1)) + highest
    expected = (total - np.take_along_axis(logits, labels[..., None], -1)[..., 0]).mean()
    assert evaluated["tokens"] == used
    assert evaluated["loss"] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("layout", [PP2_TP2, {"sharded_data_parallel": 2}], ids=["same layout", "sdp2"])
def test_a_run_that_was_cut_off_goes_on_from_its_last_checkpoint(
    finished: Run, layout: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(WorkerError):
        estimator(tmp_path, PP2_TP2, launcher=faulty("kill", 1, 6)).fit(train=TEXT, validation=0.05)
    run = estimator(tmp_path, layout).fit(train=TEXT, validation=0.05)
    exactly = layout == PP2_TP2
    assert losses(run) == (losses(finished) if exactly else pytest.approx(losses(finished), rel=1e-5))
    assert no_process_left(tmp_path)


FAULTS = {
    "raise": r"ArithmeticError: planted: the rank's own message",
    "kill": r"SIGKILL",
    "hang": r"step 2: a planted wait",
    "ragged": r"input_ids",
    "long": r"input_ids",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_ends_the_run_in_seconds_with_its_cause_on_top(fault: str, tmp_path: Path) -> None:
    job = estimator(tmp_path, PP2, launcher=faulty(fault, 1, 2, timeout=20.0))
    started = time.monotonic()
    with pytest.raises(WorkerError) as caught:
        job.fit(train=TEXT)
    message = str(caught.value)
    assert re.search(rf"(?s)rank 1.*{FAULTS[fault]}", message), message
    assert "rank 1" in message.splitlines()[0]
    assert time.monotonic() - started < 90, "starting the processes takes most of it"
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
from tests.tf.test_run import PP2_TP2, TEXT, estimator
from pathlib import Path
run = estimator(Path(sys.argv[1]), PP2_TP2).fit(train=TEXT, validation=0.05)
"""


def start_by_hand(script: Path, rank: int, addresses: list[str], seconds: float) -> subprocess.Popen[bytes]:
    cluster = {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": rank}}
    world_size = str(len(addresses))
    environment = os.environ | {
        "PYTHONPATH": str(ROOT), "TF_CONFIG": json.dumps(cluster), "RANK": str(rank), "WORLD_SIZE": world_size,
        "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": world_size, "MPSDK_GENERATION": "by-hand",
        "MPSDK_TIMEOUT": str(seconds),
    }  # fmt: skip
    command = [sys.executable, str(script), str(script.with_name("run"))]
    with script.with_name(f"errors-{rank}").open("wb") as errors:
        return subprocess.Popen(command, env=environment, stderr=errors)


def test_the_same_script_runs_unchanged_where_tf_config_says_who_is_who(
    finished: Run, tmp_path: Path
) -> None:
    """The last rank comes later than one that is there already may take to answer."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT, encoding="utf-8")
    addresses = _free_addresses(4)
    workers = [start_by_hand(script, rank, addresses, 240) for rank in range(3)]
    try:
        time.sleep(15)
        workers.append(start_by_hand(script, 3, addresses, 240))
        codes = [worker.wait(timeout=300) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    errors = "\n".join(f"rank {rank}: {_end(tmp_path / f'errors-{rank}')}" for rank in range(4))
    assert codes == [0, 0, 0, 0], errors
    assert losses(Run.load(tmp_path / "run")) == losses(finished)


def test_a_rank_of_tf_config_that_never_comes_is_named_with_its_address(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.replace("PP2_TP2", "TP2"), encoding="utf-8")
    addresses = _free_addresses(2)
    worker = start_by_hand(script, 0, addresses, 3)
    try:
        assert worker.wait(timeout=120) == 1
    finally:
        worker.kill()
    errors = (tmp_path / "errors-0").read_text(encoding="utf-8")
    assert f"rank 0 has waited 3 s and these do not answer: rank 1 at {addresses[1]}" in errors


def _end(file: Path) -> str:
    return file.read_text(encoding="utf-8")[-4000:]


def _free_addresses(count: int) -> list[str]:
    """Ports below those that systems give to connections, which any process beside could be given meanwhile."""
    with contextlib.ExitStack() as stack:
        addresses: list[str] = []
        while len(addresses) < count:
            here = ("127.0.0.1", random.randrange(20_000, 32_000))
            with contextlib.suppress(OSError):
                stack.enter_context(contextlib.closing(socket.socket())).bind(here)
                addresses.append(f"{here[0]}:{here[1]}")
        return addresses
