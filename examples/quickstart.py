"""Train a small GPT-2 on four processes, export it, and let a model of the framework confirm the loss and write a few lines.

Run from the repository's root: `python examples/quickstart.py`, or `nox -s quickstart`, which installs what it needs. With
`--framework tensorflow`, or `nox -s quickstart-tf`, the same job trains in TensorFlow; PyTorch is not needed then. The job
itself is quickstart.yaml, beside this file; how the exported model is loaded and run, in PyTorch and in TensorFlow, is in
with_transformers.py and with_keras.py.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mpsdk import Estimator, Run
from mpsdk.backend import WEIGHT
from mpsdk.checkpoint import Checkpoint
from mpsdk.config import Job
from mpsdk.families.hf import HuggingFaceSource, read_model

JOB = Path(__file__).with_suffix(".yaml")
READERS = {"torch": "with_transformers", "tensorflow": "with_keras"}
END_OF_DOCUMENT = 256
TOLERANCE = 1e-4  # between the run's validation loss and that of the exported model
PROMPT = "My lord, "


def main() -> int:
    job = Job.from_file(JOB)
    assert isinstance(job.data.validation, str)
    parser = argparse.ArgumentParser(description="mpsdk's main job, from training to text")
    parser.add_argument("--framework", choices=READERS, default=job.framework, help="not the job's own")
    framework = parser.parse_args().framework
    output_dir = Path(job.output_dir if framework == job.framework else f"{job.output_dir}-{framework}")

    if (output_dir / "job.json").is_file():
        print(f"Removing {output_dir}, of an earlier quickstart, to start from the beginning.\n")
        shutil.rmtree(output_dir)
    estimator = Estimator(
        job.model,
        framework=framework,
        distribution=job.distribution,
        training=job.training,
        output_dir=output_dir,
    )
    # Prints the plan, then progress.
    run = estimator.fit(train=job.data.train, validation=job.data.validation)
    loss = [row["validation_loss"] for row in run.history if "validation_loss" in row][-1]

    exported = run.export(output_dir / "export")
    unequal = unequal_weights(run, exported)
    reader = import_module(READERS[framework])
    model = reader.load(exported)
    inputs, labels = samples(Path(job.data.validation), job.training.sequence_length)
    confirmed = reader.loss_of(model, inputs, labels)
    entropy = unigram_entropy(labels)

    difference = abs(confirmed - loss)
    print("\nOn the validation text, in nats a byte:")
    print(f"  {loss:.4f}  loss of this run")
    print(
        f"  {confirmed:.4f}  loss of the exported model in {reader.NAME}; the difference is {difference:.1e}"
    )
    print(f"  {entropy:.4f}  unigram entropy, the least that a model can reach without looking back")
    print(f"  {loss / entropy:.4f}  loss / unigram entropy")
    if not unequal:
        print(f"\nEvery weight in {exported} is that of the run's last checkpoint, byte for byte.")
    text = reader.continuation(model, PROMPT, end=END_OF_DOCUMENT)
    print(f"\nWritten by the exported model in {reader.NAME}:\n\n{text}\n")

    if difference > TOLERANCE:
        print(f"{reader.NAME} does not confirm the loss to {TOLERANCE}", file=sys.stderr)
    if unequal:
        print(f"the export differs from the checkpoint in {', '.join(unequal)}", file=sys.stderr)
    return 1 if unequal or difference > TOLERANCE else 0


def unequal_weights(run: Run, exported: Path) -> list[str]:
    """The canonical names of the weights whose bytes in the export are not those in the run's newest checkpoint."""
    assert run.latest_checkpoint is not None
    checkpoint = Checkpoint.open(run.latest_checkpoint)
    read = read_model(exported)
    export = HuggingFaceSource(exported, read.family, read.spec)
    unequal = []
    for tensor in run.plan.description.tensors():
        whole = (tensor.name, WEIGHT, (0,) * len(tensor.shape), tensor.shape)
        if checkpoint.read(*whole).tobytes() != export.read(*whole).tobytes():
            unequal.append(tensor.name)
    return unequal


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


if __name__ == "__main__":
    sys.exit(main())
