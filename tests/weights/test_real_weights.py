"""Real pretrained weights in both frameworks, in pieces, against transformers."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import AutoModel, AutoTokenizer

from mpsdk.config import Distribution, Training
from mpsdk.families import read_model
from mpsdk.families.describe import describe_spec
from mpsdk.families.spec import Objective
from mpsdk.plan import Plan
from mpsdk.resolve import resolve
from tests.parity import tensorflow_side as process
from tests.torch.pool import WorkerPool
from tests.weights import models, tensorflow_side, torch_side

BOUND = 1e-4
LENGTH = 32
LAYOUTS = ("tp", "pp2")
TENSOR_PARALLEL = {"minilm": 2, "smollm2": 3}  # which has 9 heads


class Pretrained(NamedTuple):
    name: str
    directory: Path
    batch: dict[str, NDArray[np.int32]]
    states: NDArray[Any]  # after the last block, before any norm


@pytest.fixture(scope="session")
def pool() -> Iterator[WorkerPool]:
    workers = WorkerPool(3)
    yield workers
    workers.close()


@pytest.fixture(scope="session")
def tensorflow() -> Iterator[ProcessPoolExecutor]:
    with ProcessPoolExecutor(1, get_context("spawn"), initializer=process.begin) as executor:
        yield executor


@pytest.fixture(scope="session", params=["minilm", "smollm2"])
def pretrained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pretrained:
    directory = (
        models.minilm()
        if request.param == "minilm"
        else models.smollm2(tmp_path_factory.mktemp("weights") / "smollm2")
    )
    if directory is None:
        pytest.skip("the package of the weights is not installed; run: nox -s weights")
    tokenizer = AutoTokenizer.from_pretrained(directory)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    encoded = tokenizer(
        models.TEXTS, padding="max_length", max_length=LENGTH, truncation=True, return_tensors="np"
    )
    batch = {name: encoded[name].astype(np.int32) for name in ("input_ids", "attention_mask")}
    found: list[torch.Tensor] = []
    model: Any = AutoModel.from_pretrained(directory).eval()
    blocks = model.encoder.layer if request.param == "minilm" else model.layers
    blocks[-1].register_forward_hook(lambda module, inputs, output: found.append(output))
    with torch.no_grad():
        model(**{name: torch.from_numpy(rows).long() for name, rows in batch.items()})
    (states,) = found
    return Pretrained(
        request.param, directory, batch, (states[0] if isinstance(states, tuple) else states).numpy()
    )


def plan_for(pretrained: Pretrained, layout: str, framework: str) -> Plan:
    """For an objective whose batches have masks."""
    degree = TENSOR_PARALLEL[pretrained.name] if layout == "tp" else 2
    distribution: dict[str, Any] = {
        "tp": {"tensor_parallel": {"degree": degree, "sequence_parallel": False}},
        "pp2": {"pipeline": {"degree": degree, "microbatches": 1}},
    }[layout]
    objective: Objective = "token-classification"
    spec = read_model(pretrained.directory, objective=objective).spec
    training = Training(
        objective=objective, global_batch=len(models.TEXTS), sequence_length=LENGTH, dropout=0.0
    )
    return resolve(
        Distribution.parse(distribution),
        describe_spec(spec),
        training,
        world_size=degree,
        framework=framework,
    )


def assert_states(found: list[NDArray[Any] | None], pretrained: Pretrained) -> None:
    here = [states for states in found if states is not None]
    assert here
    seen = pretrained.batch["attention_mask"].astype(bool)
    wanted = pretrained.states[seen]
    for states in here:
        assert np.abs(states[seen] - wanted).max() <= BOUND * np.abs(wanted).max()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_pytorch_finds_the_hidden_states_of_transformers(
    pretrained: Pretrained, pool: WorkerPool, layout: str
) -> None:
    plan = plan_for(pretrained, layout, "torch")
    labels = np.zeros_like(pretrained.batch["input_ids"])
    batch = pretrained.batch | {"labels": labels, "token_type_ids": labels}
    batch = {name: batch[name] for name in plan.batch_shapes}
    found = pool.run(plan.world_size, torch_side.hidden_states, plan, str(pretrained.directory), batch)
    assert_states(found, pretrained)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_tensorflow_finds_the_hidden_states_of_transformers(
    pretrained: Pretrained, tensorflow: ProcessPoolExecutor, layout: str
) -> None:
    plan = plan_for(pretrained, layout, "tensorflow")
    answer = tensorflow.submit(
        tensorflow_side.hidden_states, plan, str(pretrained.directory), pretrained.batch
    )
    assert_states(answer.result(), pretrained)
