"""An exported model in PyTorch: transformers loads it, and knows nothing of mpsdk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

NAME = "transformers"


def load(directory: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory).eval()


@torch.inference_mode()
def loss_of(model: Any, inputs: NDArray[np.int64], labels: NDArray[np.int64], rows: int = 32) -> float:
    """Mean loss a token; `inputs` and `labels` are (samples, length)."""
    total = 0.0
    for start in range(0, len(inputs), rows):
        logits = model(torch.from_numpy(inputs[start : start + rows])).logits
        wanted = torch.from_numpy(labels[start : start + rows])
        total += cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="sum").item()
    return total / labels.size


def continuation(model: Any, prompt: str, *, end: int, length: int = 110) -> str:
    """`prompt` and what the model writes after it, sampled from the eight likeliest bytes at a time, as far as `end`."""
    torch.manual_seed(0)
    ids = torch.tensor([list(prompt.encode())])
    written = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=length,
        do_sample=True,
        top_k=8,
        pad_token_id=end,
    )
    return bytes(token for token in written[0].tolist() if token != end).decode(errors="replace")
