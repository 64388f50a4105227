"""A model of transformers beside mpsdk's Transformer with the same weights, in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor

from mpsdk.backend import IGNORED_LABEL
from mpsdk.families import FAMILIES
from mpsdk.families.describe import describe_spec
from mpsdk.families.layout import hf_tensors
from mpsdk.families.spec import TransformerSpec
from mpsdk_torch.comm import TensorGroup
from mpsdk_torch.loss import class_cross_entropy_sum, cross_entropy_sum
from mpsdk_torch.transformer import Transformer
from tests.family_configs import LABELS, VOCABULARY

ROWS, LENGTH = 3, 9


class Case:
    """A model of transformers with random weights, in float64, and the same as mpsdk's Transformer.

    `noise`: how far weights, biases and norms stand from their first values. The more, the more rounding in float32 grows on
    its way through the model.
    """

    def __init__(self, config: dict[str, Any], head: str, *, noise: float = 0.3) -> None:
        family = self.family = FAMILIES[config["model_type"]]
        (table,) = (each for each in family.heads if each.form.objective == head)
        settings = {name: value for name, value in config.items() if name != "model_type"}
        made = transformers.AutoConfig.for_model(family.model_type, **settings, num_labels=LABELS)
        torch.manual_seed(0)
        self.theirs: Any = getattr(transformers, table.architecture)(made).double().eval()
        with torch.no_grad():
            for parameter in self.theirs.parameters():
                parameter.add_(torch.randn_like(parameter) * noise)
        self.spec: TransformerSpec = family.spec(
            made.to_dict(), objective=table.form.objective, exhaustive=True
        )
        self.tensors = hf_tensors(family.rules(table.form.objective), describe_spec(self.spec))
        self.ours = Transformer(self.spec).double().eval()
        self._fill()

    def _fill(self) -> None:
        """Piece by piece, by the family's rules."""
        theirs, ours = self.theirs.state_dict(), dict(self.ours.named_parameters())
        with torch.no_grad():
            for tensor in self.tensors:
                whole = theirs[self.name_of(tensor.name)]
                for part in tensor.parts:
                    if part.name in ours:
                        for there, here in tensor.pieces(part, (0,) * len(part.shape), part.shape):
                            ours[part.name][here] = whole[there].T if tensor.transpose else whole[there]

    def name_of(self, name: str) -> str:
        """In memory, of a tensor in a file."""
        for in_file, here in self.family.in_memory.items():
            name = name.replace(in_file, here)
        return name

    def gradients(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Ours and theirs, under their names."""
        ours = {name: parameter.grad for name, parameter in self.ours.named_parameters()}
        theirs = {name: parameter.grad for name, parameter in self.theirs.named_parameters()}
        found: dict[str, tuple[Tensor, Tensor]] = {}
        for tensor in self.tensors:
            if tensor.tied:
                continue
            whole = torch.empty(tensor.shape, dtype=torch.float64)
            for part in tensor.parts:
                gradient = ours[part.name]
                assert gradient is not None, part.name
                for there, here in tensor.pieces(part, (0,) * len(part.shape), part.shape):
                    whole[there] = gradient[here].T if tensor.transpose else gradient[here]
            expected = theirs[self.name_of(tensor.name)]
            assert expected is not None
            found[tensor.name] = whole, expected
        return found


def inputs(spec: TransformerSpec, padding: str, seed: int) -> dict[str, Tensor]:
    """Rows of which two are padded, and types of tokens where the model has any."""
    random = np.random.default_rng(seed)
    ids = random.integers(4, VOCABULARY, size=(ROWS, LENGTH))
    mask = np.ones((ROWS, LENGTH), np.int64)
    for row, size in ((1, 2), (2, 4)):
        if padding == "right":
            mask[row, LENGTH - size :] = 0
        elif padding == "left":
            mask[row, :size] = 0
    ids = np.where(mask, ids, spec.position_padding or 0)
    given = {"input_ids": ids, "attention_mask": mask}
    if spec.token_types:
        given["token_type_ids"] = random.integers(spec.token_types, size=ids.shape)
    return {name: torch.from_numpy(values) for name, values in given.items()}


def labels_for(spec: TransformerSpec, mask: Tensor, seed: int) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    if spec.head.objective == "sequence-classification":
        return torch.randint(LABELS, (ROWS,), generator=random)
    labels = torch.randint(LABELS if spec.head.classifies else VOCABULARY, (ROWS, LENGTH), generator=random)
    return labels.masked_fill(mask == 0, IGNORED_LABEL)


def loss_of(spec: TransformerSpec, logits: Tensor, labels: Tensor) -> Tensor:
    if spec.head.classifies:
        return class_cross_entropy_sum(logits, labels, group=TensorGroup())
    return cross_entropy_sum(logits, labels, vocab_size=spec.vocab_size, group=TensorGroup())
