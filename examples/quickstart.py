"""Train a small GPT-2 on four processes, export it, and let transformers confirm the loss and write a few lines.

Run from the repository's root: `python examples/quickstart.py`, or `nox -s quickstart`, which installs what it needs.
The job itself is quickstart.yaml, beside this file.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from mpsdk import Estimator
from mpsdk.config import Job

JOB = Path(__file__).with_suffix(".yaml")
END_OF_DOCUMENT = 256
TOLERANCE = 1e-4  # between the run's validation loss and that of transformers
PROMPT = "My lord, "


def main() -> int:
    job = Job.from_file(JOB)
    assert isinstance(job.data.validation, str)

    if Path(job.output_dir, "job.json").is_file():
        print(f"Removing {job.output_dir}, of an earlier quickstart, to start from the beginning.\n")
        shutil.rmtree(job.output_dir)
    run = Estimator.from_file(JOB).fit()  # prints the plan, then progress
    loss = [row["validation_loss"] for row in run.history if "validation_loss" in row][-1]

    exported = run.export(Path(job.output_dir, "export"))
    model = AutoModelForCausalLM.from_pretrained(exported).eval()
    inputs, labels = samples(Path(job.data.validation), job.training.sequence_length)
    confirmed = loss_of(model, inputs, labels)
    entropy = unigram_entropy(labels)

    difference = abs(confirmed - loss)
    print("\nOn the validation text, in nats a byte:")
    print(f"  {loss:.4f}  loss of this run")
    print(
        f"  {confirmed:.4f}  loss of the exported model in transformers; the difference is {difference:.1e}"
    )
    print(f"  {entropy:.4f}  unigram entropy, the least that a model can reach without looking back")
    print(f"  {loss / entropy:.4f}  loss / unigram entropy")
    print(f"\nWritten by transformers with the model in {exported}:\n\n{continuation(model, PROMPT)}\n")

    if difference > TOLERANCE:
        print(f"transformers does not confirm the loss to {TOLERANCE}", file=sys.stderr)
        return 1
    return 0


def samples(path: Path, length: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Every byte of the text files at `path` as inputs and as the labels that follow them, each (samples, length)."""
    files = sorted(path.rglob("*.txt")) if path.is_dir() else [path]
    tokens = np.concatenate([[*file.read_bytes(), END_OF_DOCUMENT] for file in files]).astype(np.int64)
    used = (len(tokens) - 1) // length * length
    return tokens[:used].reshape(-1, length), tokens[1 : used + 1].reshape(-1, length)


def unigram_entropy(labels: NDArray[np.int64]) -> float:
    """Entropy of the frequencies of `labels`, in nats."""
    counts = np.bincount(labels.ravel())
    shares = counts[counts > 0] / labels.size
    return float(-(shares * np.log(shares)).sum())


@torch.inference_mode()
def loss_of(model: Any, inputs: NDArray[np.int64], labels: NDArray[np.int64], rows: int = 32) -> float:
    """Mean loss a token of a transformers model."""
    total = 0.0
    for start in range(0, len(inputs), rows):
        logits = model(torch.from_numpy(inputs[start : start + rows])).logits
        wanted = torch.from_numpy(labels[start : start + rows])
        total += cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="sum").item()
    return total / labels.size


def continuation(model: Any, prompt: str, length: int = 110) -> str:
    """`prompt` and what the model writes after it, sampled from the eight likeliest bytes at a time."""
    torch.manual_seed(0)
    ids = torch.tensor([list(prompt.encode())])
    written = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=length,
        do_sample=True,
        top_k=8,
        pad_token_id=END_OF_DOCUMENT,
    )
    return bytes(token for token in written[0].tolist() if token < END_OF_DOCUMENT).decode(errors="replace")


if __name__ == "__main__":
    sys.exit(main())
