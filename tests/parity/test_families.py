"""Every family with every head as a Keras model against transformers' own class, which runs in PyTorch, in float64."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from mpsdk.backend import IGNORED_LABEL
from tests.cases import BOUND, EVERY_FAMILY, EVERY_HEAD
from tests.family_configs import configs
from tests.parity import tensorflow_side
from tests.torch.beside_transformers import Case, inputs, labels_for


@pytest.mark.parametrize("name", EVERY_HEAD)
def test_logits_loss_and_every_gradient_of_the_keras_model_are_those_of_transformers(
    name: str, tensorflow: ProcessPoolExecutor, tmp_path: Path
) -> None:
    """With padding, left or right."""
    family, _, head = name.partition("-")
    config = EVERY_FAMILY[family] | {"vocab_size": 61, "bos_token_id": 1, "eos_token_id": 1}
    case = Case(config | {"pad_token_id": 1 if family == "roberta" else 0}, head, noise=0.1)
    side = "right" if _reads_the_first_token(case) else "left"
    assert_as_transformers(case, side, 7, tensorflow, tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("name", EVERY_HEAD)
@settings(max_examples=4, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(data=st.data())
def test_the_same_over_random_configurations(
    name: str, tensorflow: ProcessPoolExecutor, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """With no padding, left and right."""
    family, _, head = name.partition("-")
    case = Case(data.draw(configs(family)), head, noise=0.1)
    sides = ["none", "right"] if _reads_the_first_token(case) else ["none", "left", "right"]
    side, seed = data.draw(st.sampled_from(sides)), data.draw(st.integers(0, 99))
    assert_as_transformers(case, side, seed, tensorflow, tmp_path_factory.mktemp("model"))


def _reads_the_first_token(case: Case) -> bool:
    """Which padding on the left would take the place of."""
    return case.spec.head.pooled == "first" and not case.spec.causal


def assert_as_transformers(
    case: Case, side: str, seed: int, tensorflow: ProcessPoolExecutor, directory: Path
) -> None:
    head = case.spec.head.objective
    case.theirs.float().save_pretrained(directory)
    case.theirs.double()
    spec = case.spec
    arguments = inputs(spec, side, seed)
    mask, labels = arguments["attention_mask"], labels_for(spec, arguments["attention_mask"], 5)

    arrays = {key: values.numpy().astype(np.int32) for key, values in arguments.items()}
    answer = tensorflow.submit(
        tensorflow_side.gradients, str(directory), arrays, labels.numpy().astype(np.int32)
    )
    theirs = case.theirs(**arguments).logits
    expected = torch.nn.functional.cross_entropy(
        theirs.flatten(0, -2), labels.flatten(), ignore_index=IGNORED_LABEL, reduction="sum"
    )
    expected.backward()

    logits, loss, gradients = answer.result()
    seen: Any = slice(None) if head == "sequence-classification" else mask.bool().numpy()
    wanted = theirs.detach().numpy()[seen]
    assert np.abs(logits[seen] - wanted).max() <= BOUND * np.abs(wanted).max()
    assert loss == pytest.approx(expected.item(), rel=BOUND)
    used = [parameter.grad for parameter in case.theirs.parameters() if parameter.grad is not None]
    largest = max(gradient.abs().max().item() for gradient in used)
    for tensor in case.tensors:
        if tensor.tied:
            continue
        reference = case.theirs.get_parameter(case.name_of(tensor.name)).grad.numpy()
        whole: NDArray[Any] = np.empty(tensor.shape)
        for part in tensor.parts:
            for there, here in tensor.pieces(part, (0,) * len(part.shape), part.shape):
                whole[there] = tensor.turn(gradients[part.name][here])
        floor = 1e-9
        if any(part.name.endswith("key.bias") for part in tensor.parts) and spec.positions == "learned":
            floor = (
                1e-6  # of a key's bias it is zero by symmetry, and in float32 what rounding leaves of that
            )
        off = np.abs(whole - reference).max()
        assert off <= BOUND * np.abs(reference).max() + floor * largest, f"{tensor.name}: off by {off}"
