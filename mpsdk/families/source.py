"""Weights from a Hugging Face directory, under canonical names, slice by slice."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mpsdk.backend import WEIGHT
from mpsdk.description import TensorDescription
from mpsdk.errors import CheckpointError
from mpsdk.families.describe import describe_spec
from mpsdk.families.family import Family
from mpsdk.families.files import DTYPES, Stored, has_weights, stored_tensors
from mpsdk.families.layout import HfTensor, hf_tensors
from mpsdk.families.match import left_out, left_over, match, misshapen, respelt
from mpsdk.families.spec import TransformerSpec
from mpsdk.initialise import RandomSource, check_slice

logger = logging.getLogger(__name__)

__all__ = ["HuggingFaceSource", "has_weights"]

ROWS_COMPARED = 1024  # of a tied pair that a file holds twice


class HuggingFaceSource:
    """A TensorSource over the safetensors files of a Hugging Face directory. Values come as float32.

    Opening it checks every name and shape by the files' headers (and a tied pair that is stored twice by its values);
    `read` reads no more than the slice asked for. A layer of the head that the files don't have at all, as when a model is
    to learn another objective, has initial values from `seed`, with a warning; a causal language model's they must have.

    Raises:
        CheckpointError: no readable weights, or tensors that are missing, left over, of another shape or of a type that is
            not float32, float16 or bfloat16: all of these in one error.
    """

    slots: frozenset[str] = frozenset({WEIGHT})

    def __init__(
        self, directory: str | Path, family: Family, spec: TransformerSpec, *, seed: int = 0
    ) -> None:
        self._directory = Path(directory)
        self.scalars: Mapping[str, float | int] = {}
        description = describe_spec(spec)
        tensors = hf_tensors(family.rules(spec.head.objective), description)
        found = {respelt(name, family): stored for name, stored in stored_tensors(self._directory).items()}
        matched = match(tensors, found, family.prefix)
        self._new = RandomSource(description, seed)
        self._new_names = _new_layers(tensors, matched, spec)
        if self._new_names:
            logger.warning(
                "%s has none of %s: they start from initial values",
                self._directory,
                ", ".join(sorted(self._new_names)),
            )
        tensors = tuple(tensor for tensor in tensors if tensor.parts[0].name not in self._new_names)
        problems = [
            *left_out(tensors, matched),
            *misshapen(tensors, matched),
            *_unreadable(tensors, matched),
            *left_over(found, matched, family, spec),
        ]
        if problems:
            raise self._refusal(problems)
        self._where: dict[str, tuple[HfTensor, TensorDescription, Stored]] = {}
        for tensor in tensors:
            if tensor.name in matched:
                for part in tensor.parts:
                    self._where[part.name] = (tensor, part, matched[tensor.name])
        self._tie(tensors)

    def read(
        self, name: str, slot: str, offset: tuple[int, ...], shape: tuple[int, ...]
    ) -> NDArray[np.float32]:
        if slot == WEIGHT and name in self._new_names:
            return self._new.read(name, slot, offset, shape)
        if slot != WEIGHT or name not in self._where:
            raise CheckpointError(f"{self._directory} has no {slot} of {name!r}")
        tensor, part, stored = self._where[name]
        check_slice(part, offset, shape)
        pieces = list(tensor.pieces(part, offset, shape))
        if len(pieces) == 1:
            return np.ascontiguousarray(tensor.turn(stored.read(pieces[0][0])))
        values = np.empty(shape, dtype=np.float32)
        for there, here in pieces:
            values[here] = tensor.turn(stored.read(there))
        return values

    def _tie(self, tensors: tuple[HfTensor, ...]) -> None:
        """A tied tensor reads as its owner. A file may hold either or both; both must be equal, as transformers asks."""
        for part in (part for tensor in tensors for part in tensor.parts):
            owner = part.tied_to
            if owner is None:
                continue
            if part.name in self._where and owner in self._where and not self._equal(part, owner):
                raise self._refusal(
                    [f"{part.name} and {owner} differ, and the configuration has tie_word_embeddings = true"]
                )
            there = self._where[owner] if owner in self._where else self._where[part.name]
            self._where[part.name] = self._where[owner] = there

    def _equal(self, part: TensorDescription, owner: str) -> bool:
        rest = part.shape[1:]
        for row in range(0, part.shape[0], ROWS_COMPARED):
            offset = (row, *(0 for _ in rest))
            shape = (min(ROWS_COMPARED, part.shape[0] - row), *rest)
            first, second = (self.read(name, WEIGHT, offset, shape) for name in (part.name, owner))
            if not np.array_equal(first, second, equal_nan=True):
                return False
        return True

    def _refusal(self, problems: list[str]) -> CheckpointError:
        lines = [f"the weights in {self._directory} do not fit its configuration:", *problems]
        return CheckpointError("\n  ".join(lines))


def _new_layers(
    tensors: tuple[HfTensor, ...], matched: Mapping[str, Stored], spec: TransformerSpec
) -> frozenset[str]:
    """The canonical tensors of the layers of the head that are wholly absent, for a head that can be new."""
    if spec.head.objective == "causal-lm":
        return frozenset()
    layers: dict[str, dict[str, bool]] = {}
    for tensor in tensors:
        name = tensor.parts[0].name
        layer = name.rpartition(".")[0]
        if layer.startswith("head.") and layer != "head.norm" and not tensor.tied:
            layers.setdefault(layer, {})[name] = tensor.name in matched
    return frozenset(name for found in layers.values() if not any(found.values()) for name in found)


def _unreadable(tensors: tuple[HfTensor, ...], matched: Mapping[str, Stored]) -> Iterator[str]:
    for tensor in tensors:
        stored = matched.get(tensor.name)
        if stored is not None and stored.dtype not in DTYPES:
            yield f"wrong type: {tensor.name} is {stored.dtype}; {', '.join(DTYPES)} can be read"
