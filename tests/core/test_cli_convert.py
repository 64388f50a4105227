"""`mpsdk checkpoint convert`: what it prints, where, and with which exit code."""

from __future__ import annotations

import json
from pathlib import Path

from mpsdk.checkpoint import Checkpoint
from tests.core.command import Mpsdk, Outcome
from tests.core.families.configurations import GPT2
from tests.core.families.test_weights import written


def test_a_directory_becomes_a_checkpoint_and_a_directory_again(mpsdk: Mpsdk, tmp_path: Path) -> None:
    written(tmp_path / "hf", GPT2)
    checkpoint, again = tmp_path / "checkpoint", tmp_path / "again"
    assert mpsdk("checkpoint", "convert", tmp_path / "hf", checkpoint) == Outcome(
        0, f"made {checkpoint}\n", ""
    )
    assert mpsdk("checkpoint", "verify", checkpoint) == Outcome(0, f"{checkpoint}: intact\n", "")
    options = ("--dtype", "bfloat16", "--max-shard-bytes", 2000, "--config", tmp_path / "hf")
    assert mpsdk("checkpoint", "convert", checkpoint, again, *options) == Outcome(0, f"made {again}\n", "")
    assert json.loads((again / "config.json").read_text())["dtype"] == "bfloat16"
    assert len(list(again.glob("model-*.safetensors"))) > 1


def test_the_head_is_chosen_by_its_objective(mpsdk: Mpsdk, tmp_path: Path) -> None:
    written(tmp_path / "hf", GPT2)
    options = ("--objective", "token-classification", "--labels", 5)
    assert mpsdk("checkpoint", "convert", tmp_path / "hf", tmp_path / "out", *options).code == 0
    assert Checkpoint.open(tmp_path / "out").shapes()["head.classifier.weight"] == (5, 8)


def test_wrong_options_end_with_2_and_all_of_them_are_told(mpsdk: Mpsdk, tmp_path: Path) -> None:
    written(tmp_path / "hf", GPT2)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    options = ("--dtype", "float16", "--objective", "masked-lm")
    outcome = mpsdk("checkpoint", "convert", tmp_path / "hf", tmp_path / "out", *options)
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.splitlines()[0] == "3 problems in the conversion:"
    assert all(name in outcome.err for name in ("target", "dtype", "training.objective"))
    assert "Traceback" not in outcome.err


def test_a_source_that_is_not_there_ends_with_1(mpsdk: Mpsdk, tmp_path: Path) -> None:
    outcome = mpsdk("checkpoint", "convert", tmp_path / "nothing", tmp_path / "out")
    assert outcome == Outcome(1, "", f"there is nothing at {tmp_path / 'nothing'}\n")
