"""What `mpsdk checkpoint convert` makes of a Hugging Face directory is where training may start; and back in transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from mpsdk.backend import Place
from mpsdk.checkpoint import Checkpoint, convert
from mpsdk.families import FAMILIES, read_model
from mpsdk.families.hf import HuggingFaceSource
from mpsdk.plan import Plan
from tests.cases import EVERY_HEAD, Outcome, assemble
from tests.cases import FAMILIES as SMALL
from tests.layouts import LAYOUTS
from tests.torch.cases import make_plan, train
from tests.torch.pool import WorkerPool
from tests.torch.test_translate import model_of, of


@pytest.mark.parametrize("name", EVERY_HEAD)
def test_transformers_own_directory_comes_back_as_the_model_that_it_was(name: str, tmp_path: Path) -> None:
    family, _, objective = name.partition("-")
    original: Any = model_of(of(family), objective)
    original.save_pretrained(tmp_path / "hf", max_shard_size="40KB")
    convert(tmp_path / "hf", tmp_path / "checkpoint")
    convert(tmp_path / "checkpoint", tmp_path / "again")
    (head,) = (each for each in FAMILIES[family].heads if each.form.objective == objective)
    again, report = getattr(transformers, head.architecture).from_pretrained(
        tmp_path / "again", output_loading_info=True
    )
    assert not any(report.values()), report
    written = again.config.to_diff_dict()
    assert {key: written[key] for key in original.config.to_diff_dict()} == original.config.to_diff_dict()
    for key, parameter in original.named_parameters():
        assert torch.equal(again.get_parameter(key), parameter), key


def from_checkpoint(place: Place, plan: Plan, path: str) -> Outcome:
    return train(place, plan, 3, source=Checkpoint.open(path), gradients=False)


def from_directory(place: Place, plan: Plan, path: str) -> Outcome:
    read = read_model(path)
    return train(place, plan, 3, source=HuggingFaceSource(path, read.family, read.spec), gradients=False)


@pytest.mark.parametrize("layout", ["pp2-tp2", "sdp2-parameters"])
def test_training_from_a_converted_checkpoint_is_training_from_the_directory(
    pool: WorkerPool, layout: str, tmp_path: Path
) -> None:
    """Bit for bit, moments included."""
    model_of(SMALL["gpt2"], "causal-lm").save_pretrained(tmp_path / "hf")  # type: ignore[operator]
    convert(tmp_path / "hf", tmp_path / "checkpoint")
    world_size, distribution = LAYOUTS[layout]
    plan = make_plan("gpt2", world_size, distribution)
    mine, theirs = (
        pool.run(world_size, work, plan, str(tmp_path / name))
        for work, name in ((from_checkpoint, "checkpoint"), (from_directory, "hf"))
    )
    assert [outcome.losses for outcome in mine] == [outcome.losses for outcome in theirs]
    first, second = (
        assemble([piece for outcome in found for piece in outcome.state]) for found in (mine, theirs)
    )
    assert first.keys() == second.keys()
    assert all((first[key] == second[key]).all() for key in first)
