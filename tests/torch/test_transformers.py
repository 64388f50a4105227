"""Against transformers' own models: logits, loss, gradients, training, and exported weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedModel

from mpsdk.backend import IGNORED_LABEL, Place
from mpsdk.families import read_model
from mpsdk.families.hf import HuggingFaceSource, export
from mpsdk_torch import from_pretrained
from tests.cases import BOUND, MemorySource, Outcome, assemble, global_batch
from tests.layouts import LAYOUTS
from tests.torch.cases import make_plan, train
from tests.torch.pool import WorkerPool

CONFIGS = {
    "gpt2": GPT2Config(
        vocab_size=101, n_positions=32, n_embd=64, n_layer=4, n_head=8, resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0, bos_token_id=1, eos_token_id=1,
    ),
    "llama": LlamaConfig(
        vocab_size=101, max_position_embeddings=32, hidden_size=64, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=4, intermediate_size=112, tie_word_embeddings=True, bos_token_id=1, eos_token_id=1,
    ),
    "llama-untied": LlamaConfig(
        vocab_size=101, max_position_embeddings=32, hidden_size=64, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=4, intermediate_size=112, tie_word_embeddings=False, bos_token_id=1, eos_token_id=1,
        attention_bias=True, mlp_bias=True,
        rope_parameters={
            "rope_type": "llama3", "rope_theta": 500.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    ),
}  # fmt: skip


@pytest.fixture(params=CONFIGS)
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[PreTrainedModel, Path]:
    """A model of transformers with random weights (norms and biases too), and the directory that it was saved to."""
    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_config(CONFIGS[request.param])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(
                1.0 if "norm" in name or ("ln_" in name and name.endswith("weight")) else 0.0, 0.05
            )
    directory = tmp_path / "model"
    model.save_pretrained(directory)
    return model.eval(), directory


def reference_loss(model: PreTrainedModel, batch: Any) -> torch.Tensor:
    logits = model(torch.from_numpy(batch["input_ids"]).long(), use_cache=False).logits
    labels = torch.from_numpy(batch["labels"]).long()
    return torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED_LABEL
    )


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
    family = "gpt2" if reference.config.model_type == "gpt2" else "llama"
    plan = make_plan(
        family, world_size, distribution, model=reference.config.to_dict(), weight_decay=0.1, steps=10
    )
    outcomes = pool.run(world_size, train_from_directory, plan, str(directory), 10)

    decay = [p for p in reference.parameters() if p.ndim == 2]
    rest = [p for p in reference.parameters() if p.ndim != 2]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    )
    losses, norms = [], []
    for step in range(10):
        loss = reference_loss(reference, global_batch(step, 101))
        loss.backward()
        norms.append(
            torch.nn.utils.clip_grad_norm_(reference.parameters(), plan.training.max_grad_norm).item()
        )
        for group in optimizer.param_groups:
            group["lr"] = plan.training.learning_rate_at(step)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
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
    family = "gpt2" if reference.config.model_type == "gpt2" else "llama"
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
