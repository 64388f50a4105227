"""Against transformers' own models: logits, loss, gradients, training, and exported weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from mpsdk.backend import Place
from mpsdk.families import read_model
from mpsdk.families.hf import HuggingFaceSource, export
from mpsdk_torch import from_pretrained
from tests.cases import BOUND, MemorySource, Outcome, assemble, global_batch
from tests.layouts import LAYOUTS
from tests.torch.cases import make_plan, train
from tests.torch.pool import WorkerPool
from tests.torch.reference import CONFIGS, family_of, reference_training, saved_model


@pytest.fixture(params=CONFIGS)
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[PreTrainedModel, Path]:
    """A model of transformers with random weights, and the directory that it was saved to."""
    directory = tmp_path / "model"
    return saved_model(request.param, directory), directory


def test_logits_are_those_of_transformers(saved: tuple[PreTrainedModel, Path]) -> None:
    reference, directory = saved
    ids = torch.from_numpy(global_batch(0, 101)["input_ids"]).long()
    model = from_pretrained(directory)
    logits, expected = model(ids), reference(ids, use_cache=False).logits
    assert (logits - expected).abs().max() <= BOUND * expected.abs().max()


@pytest.mark.parametrize("layout", ["single", "pp2-tp2", "sdp2-tp2"])
def test_training_from_a_saved_directory_follows_transformers_with_torch_adamw(
    saved: tuple[PreTrainedModel, Path], layout: str, pool: WorkerPool
) -> None:
    reference, directory = saved
    world_size, distribution = LAYOUTS.get(layout, (1, {}))
    family = family_of(reference)
    plan = make_plan(
        family, world_size, distribution, model=reference.config.to_dict(), weight_decay=0.1, steps=10
    )
    outcomes = pool.run(world_size, train_from_directory, plan, str(directory), 10)

    losses, norms = reference_training(reference, plan, 10)
    np.testing.assert_allclose(outcomes[0].losses, losses, rtol=BOUND)
    np.testing.assert_allclose(outcomes[0].norms, norms, rtol=BOUND)


def train_from_directory(place: Place, plan: Any, directory: str, steps: int) -> Outcome:
    read = read_model(directory)
    source = HuggingFaceSource(directory, read.family, read.spec)
    return train(place, plan, steps, source=source, gradients=False)


def test_exported_weights_of_a_parallel_run_load_in_transformers_bit_for_bit(
    saved: tuple[PreTrainedModel, Path], pool: WorkerPool, tmp_path: Path
) -> None:
    reference, directory = saved
    family = family_of(reference)
    world_size, distribution = LAYOUTS["pp2-tp2"]
    plan = make_plan(family, world_size, distribution, model=reference.config.to_dict())
    outcomes = pool.run(world_size, train_from_directory, plan, str(directory), 0)
    weights = assemble([piece for outcome in outcomes for piece in outcome.state])
    read = read_model(directory)
    export(MemorySource(weights, {}), read.spec, tmp_path / "exported", hf_config=read.hf_config)
    exported, info = AutoModelForCausalLM.from_pretrained(tmp_path / "exported", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tensors = dict(exported.named_parameters())
    for name, parameter in reference.named_parameters():
        assert torch.equal(tensors[name], parameter), name
