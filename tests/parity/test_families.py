"""Every family with every head as a Keras model against transformers' own class, which runs in PyTorch, in float64."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from mpsdk.backend import IGNORED_LABEL
from tests.cases import BOUND, EVERY_FAMILY, EVERY_HEAD
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
    case.theirs.float().save_pretrained(tmp_path)
    case.theirs.double()
    spec = case.spec
    side = "right" if head == "sequence-classification" and not spec.causal else "left"
    given = inputs(spec, side, 7)
    mask, labels = given["attention_mask"], labels_for(spec, given["attention_mask"], 5)

    arrays = {key: values.numpy().astype(np.int32) for key, values in given.items()}
    answer = tensorflow.submit(
        tensorflow_side.gradients, str(tmp_path), arrays, labels.numpy().astype(np.int32)
    )
    theirs = case.theirs(**given).logits
    expected = torch.nn.functional.cross_entropy(
        theirs.flatten(0, -2), labels.flatten(), ignore_index=IGNORED_LABEL, reduction="sum"
    )
    expected.backward()

    logits, loss, gradients = answer.result()
    seen: Any = slice(None) if head == "sequence-classification" else mask.bool().numpy()
    wanted = theirs.detach().numpy()[seen]
    assert np.abs(logits[seen] - wanted).max() <= BOUND * np.abs(wanted).max()
    assert loss == pytest.approx(expected.item(), rel=BOUND)
    largest = max(parameter.grad.abs().max().item() for parameter in case.theirs.parameters())
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
