"""transformers' own models with random weights, and how torch's AdamW trains them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedModel

from mpsdk.backend import IGNORED_LABEL
from mpsdk.plan import Plan
from tests.cases import global_batch

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


def saved_model(name: str, directory: Path) -> PreTrainedModel:
    """The model of `CONFIGS[name]` with random weights (norms and biases too), also saved to `directory`."""
    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_config(CONFIGS[name])
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            norm = "norm" in parameter_name or ("ln_" in parameter_name and parameter_name.endswith("weight"))
            parameter.normal_(1.0 if norm else 0.0, 0.05)
    model.save_pretrained(directory)
    return model.eval()


def family_of(model: PreTrainedModel) -> str:
    return "gpt2" if model.config.model_type == "gpt2" else "llama"


def reference_loss(model: PreTrainedModel, batch: Any) -> torch.Tensor:
    logits = model(torch.from_numpy(batch["input_ids"]).long(), use_cache=False).logits
    labels = torch.from_numpy(batch["labels"]).long()
    return torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED_LABEL
    )


def reference_training(reference: PreTrainedModel, plan: Plan, steps: int) -> tuple[list[float], list[float]]:
    """Losses and gradient norms of `steps` steps on whole batches, in one process and without mpsdk."""
    training = plan.training
    assert training.max_grad_norm is not None
    decay = [p for p in reference.parameters() if p.ndim == 2]
    rest = [p for p in reference.parameters() if p.ndim != 2]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": training.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    )
    losses, norms = [], []
    for step in range(steps):
        loss = reference_loss(reference, global_batch(step, 101))
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(reference.parameters(), training.max_grad_norm).item())
        for group in optimizer.param_groups:
            group["lr"] = training.learning_rate_at(step)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, norms
