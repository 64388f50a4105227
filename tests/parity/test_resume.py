"""A run begun in one framework goes on in the other, in another layout: real processes, real text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from mpsdk import Estimator
from mpsdk.checkpoint import Checkpoint, find
from mpsdk.run import Run

pytestmark = pytest.mark.processes
BOUND = 1e-4
TEXT = Path(__file__).parents[2] / "examples" / "data" / "shakespeare" / "sonnets.txt"
MODELS: dict[str, dict[str, Any]] = {
    "gpt2": {
        "model_type": "gpt2", "vocab_size": 257, "n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 4,
        "embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0, "bos_token_id": 256, "eos_token_id": 256,
    },
    "llama": {
        "model_type": "llama", "vocab_size": 257, "max_position_embeddings": 32, "hidden_size": 32,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48,
        "tie_word_embeddings": True, "bos_token_id": 256, "eos_token_id": 256,
    },
}  # fmt: skip
TRAINING = {
    "steps": 12, "global_batch": 8, "sequence_length": 32, "learning_rate": 3e-3, "tokenizer": "bytes", "log_every": 1,
    "learning_rate_schedule": "cosine", "warmup_steps": 2, "weight_decay": 0.1, "max_grad_norm": 1.0, "accumulation": 2,
}  # fmt: skip
PP2_TP2 = {"pipeline": {"degree": 2, "microbatches": 2}, "tensor_parallel": 2}
SDP2 = {"sharded_data_parallel": 2}
HALF = 6
FRAMEWORKS = ("torch", "tensorflow")


def estimator(output_dir: Path, family: str, framework: str, distribution: dict[str, Any]) -> Estimator:
    return Estimator(
        MODELS[family],
        framework=framework,
        distribution={"checkpoint": {"every": HALF}} | distribution,
        training=TRAINING,
        output_dir=output_dir,
    )


def losses(run: Run) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in run.history if "loss" in row}


@pytest.fixture(scope="module", params=MODELS)
def finished(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, dict[str, Run]]:
    """A family, and the same run in each framework at pipeline 2 x tensor 2, uninterrupted, with a checkpoint half way."""
    runs = {}
    for framework in FRAMEWORKS:
        directory = tmp_path_factory.mktemp(f"{request.param}-{framework}")
        job = estimator(directory, request.param, framework, PP2_TP2)
        runs[framework] = job.fit(train=TEXT, validation=0.05)
    return request.param, runs


@pytest.mark.parametrize(
    ("before", "after"), [FRAMEWORKS, FRAMEWORKS[::-1]], ids=["to TensorFlow", "to PyTorch"]
)
def test_a_checkpoint_of_one_framework_resumes_in_the_other_at_sdp2(
    finished: tuple[str, dict[str, Run]], before: str, after: str, tmp_path: Path
) -> None:
    family, whole = finished[0], finished[1][before]
    half = whole.output_dir / "checkpoints" / f"step-{HALF:08}"
    assert Checkpoint.open(str(half)).step == HALF
    run = estimator(tmp_path, family, after, SDP2).fit(train=TEXT, validation=0.05, resume=str(half))

    expected = {step: loss for step, loss in losses(whole).items() if step > HALF}
    resumed = {step: loss for step, loss in losses(run).items() if step > HALF}
    assert len(resumed) == TRAINING["steps"] - HALF
    assert resumed == pytest.approx(expected, rel=BOUND)
    ends = [Checkpoint.open(str(find(each.output_dir / "checkpoints")[0])) for each in (run, whole)]
    assert_same_state(*ends)


def assert_same_state(actual: Checkpoint, expected: Checkpoint) -> None:
    """Step, data position, and the weight and moments of every tensor that has a gradient.

    A key's bias has none, by symmetry, and what AdamW makes of its rounding errors is nobody's.
    """
    assert actual.step == expected.step == TRAINING["steps"]
    assert (
        actual.samples_consumed == expected.samples_consumed == TRAINING["steps"] * TRAINING["global_batch"]
    )
    assert actual.scalars == expected.scalars
    assert actual.slots == expected.slots == {"weight", "exp_avg", "exp_avg_sq"}
    for slot in expected.slots:
        assert actual.shapes(slot) == expected.shapes(slot)
        for name, shape in expected.shapes(slot).items():
            if name.endswith("attention.key.bias"):
                continue
            values, wanted = (each.read(name, slot, (0,) * len(shape), shape) for each in (actual, expected))
            difference = np.abs(values - wanted).max()
            assert difference <= BOUND * np.abs(wanted).max(), f"{slot} of {name}: off by {difference}"


def test_the_export_of_a_tensorflow_run_has_its_validation_loss_in_transformers(
    finished: tuple[str, dict[str, Run]], tmp_path: Path
) -> None:
    run = finished[1]["tensorflow"]
    run.export(tmp_path / "export")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "export").eval()
    evaluated = run.evaluate(TEXT)
    tokens = torch.tensor([*TEXT.read_bytes(), 256])
    length = TRAINING["sequence_length"]
    used = (len(tokens) - 1) // length * length
    with torch.no_grad():
        logits = model(tokens[:used].view(-1, length)).logits.flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits, tokens[1 : used + 1]).item()
    assert evaluated["tokens"] == used
    assert evaluated["loss"] == pytest.approx(expected, abs=1e-4)
