"""State dicts between Hugging Face's names and canonical ones, in arrays of any framework, from a family's one table."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from mpsdk.description import TensorDescription
from mpsdk.errors import CheckpointError, ConfigError, Problem
from mpsdk.families.describe import TOKENS, describe_spec
from mpsdk.families.family import Family
from mpsdk.families.heads import FamilyHead
from mpsdk.families.infer import OUTPUT, POSITIONS, canonical_shapes, head_of, infer_spec
from mpsdk.families.layout import HfTensor, hf_tensors
from mpsdk.families.match import left_out, left_over, match, misshapen, respelt
from mpsdk.families.read import read_model
from mpsdk.families.spec import TransformerSpec

T = TypeVar("T")


@dataclass(frozen=True)
class Arrays(Generic[T]):
    """What translation needs of a framework's arrays, besides their `shape` and indexing by slices.

    `read` makes one of what a state dict may hold; `join` puts several together along an axis; `transpose` turns a matrix;
    `equal` says whether two hold the same values.
    """

    read: Callable[[Any], T]
    join: Callable[[Sequence[T], int], T]
    transpose: Callable[[T], T]
    equal: Callable[[T, T], bool]


NUMPY: Arrays[NDArray[np.generic]] = Arrays(
    read=np.asarray,
    join=np.concatenate,
    transpose=np.transpose,
    equal=lambda one, other: np.array_equal(one, other, equal_nan=True),
)


@dataclass(frozen=True)
class _Given(Generic[T]):
    """An array of a state dict, with its shape as plain numbers."""

    value: T
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Translator(Generic[T]):
    """A family's state dicts, whole, in both directions.

    Weights are touched as little as can be: a tensor that only gets another name stays what it is, a part of a joined tensor
    and a transposed one are views where the framework has views.
    """

    family: Family
    arrays: Arrays[T]

    def to_hugging_face(
        self, state_dict: Mapping[str, object], max_seq_len: int | None = None, *, config: object = None
    ) -> dict[str, T]:
        """From canonical names to those of transformers' model, for its `load_state_dict`.

        A tied tensor comes under each of its names, and is one tensor. Joined tensors are new.

        Args:
            state_dict: every tensor of the model; which head it has is told by them.
            max_seq_len: keep this many rows for tokens of a table of positions. None: all.
            config: the model's configuration: transformers' object, its fields, their directory, or a spec. None: what shapes
                tell is enough, save for GPT-NeoX, which joins query, key and value head by head.

        Raises:
            CheckpointError: tensors are missing, left over or of another shape, tied ones differ: all in one error.
            ConfigError: `config` is invalid or of another family, or `max_seq_len` is more than the model has.
        """
        given = {name: self._given(value) for name, value in state_dict.items()}
        shapes = {name: tensor.shape for name, tensor in given.items()}
        head = head_of(self.family, shapes)
        spec = self._spec(config, head) or infer_spec(self.family, head, shapes)
        tensors = {tensor.name: tensor for tensor in describe_spec(spec).tensors()}
        problems = [
            f"missing: {name} {tensor.shape}"
            for name, tensor in tensors.items()
            if name not in given and tensor.tied_to is None
        ]
        problems += [f"unexpected: {name} {shapes[name]}" for name in given if name not in tensors]
        problems += [
            f"wrong shape: {name} is {shapes[name]}, {_maker(config)} it {tensor.shape}"
            for name, tensor in tensors.items()
            if name in given and shapes[name] != tensor.shape
        ]
        if problems:
            raise self._refusal(problems)
        values = self._untied(tensors.values(), {name: tensor.value for name, tensor in given.items()})
        spec = self._shorten(values, spec, max_seq_len, config)
        return {
            self._in_memory(tensor.name): self._join(tensor, values)
            for tensor in _under_each_name(self.family, spec)
        }

    def from_hugging_face(
        self, state_dict: Mapping[str, object], max_seq_len: int | None = None, *, config: object = None
    ) -> dict[str, T]:
        """From the names of transformers' model, or of its files, to canonical ones, for `load_state_dict` of mpsdk's.

        A tied tensor comes once, under its owner's name. Parts that alternate in a joined tensor are new.

        Args:
            state_dict: every tensor of the model, with or without the base model's prefix; which head it has is told by them.
            max_seq_len: keep this many rows for tokens of a table of positions. None: all.
            config: the model's configuration: transformers' object, its fields, their directory, or a spec. None: what shapes
                tell is enough, save for GPT-NeoX, which joins query, key and value head by head; an output projection equal
                to the token embedding is tied to it.

        Raises:
            CheckpointError: tensors are missing, left over or of another shape, tied ones differ: all in one error.
            ConfigError: `config` is invalid or of another family, or `max_seq_len` is more than the model has.
        """
        given = {respelt(name, self.family): self._given(value) for name, value in state_dict.items()}
        full = {self._with_prefix(name): tensor for name, tensor in given.items()}
        parts = (rule for head in self.family.heads for rule in head.rules if rule.hf in full)
        head = head_of(self.family, {name for rule in parts for name in rule.canonical})
        spec = self._spec(config, head) or self._inferred(head, full)
        tensors = hf_tensors(self.family.rules(spec.head.objective), describe_spec(spec))
        matched = match(tensors, given, self.family.prefix)
        problems = [
            *left_out(tensors, matched),
            *misshapen(tensors, matched, maker=_maker(config)),
            *left_over(given, matched, self.family, spec),
        ]
        if problems:
            raise self._refusal(problems)
        found = [(tensor, part) for tensor in tensors if tensor.name in matched for part in tensor.parts]
        values = {part.name: self._part(tensor, part, matched[tensor.name].value) for tensor, part in found}
        owners = {part.name: part.tied_to for _, part in found if part.tied_to is not None}
        for name, owner in owners.items():
            values.setdefault(owner, values[name])  # files may hold either or both
        self._untied((part for _, part in found), values)
        self._shorten(values, spec, max_seq_len, config)
        return {name: value for name, value in values.items() if name not in owners}

    # -- what the model is ------------------------------------------------------------------------------------------

    def _spec(self, config: object, head: FamilyHead) -> TransformerSpec | None:
        """The spec that `config` says, with the head that the tensors have."""
        if config is None:
            return None
        if isinstance(config, str | os.PathLike):
            config = read_model(os.fspath(cast("str | os.PathLike[str]", config)), weights=False).hf_config
        elif not isinstance(config, Mapping | TransformerSpec):
            config = cast("Any", config).to_dict()
        if isinstance(config, TransformerSpec):
            family = config.family
        else:
            config = cast("Mapping[str, object]", config)
            family = config.get("model_type", self.family.model_type)
        if family != self.family.model_type:
            remedy = f"these are the weights of a {self.family.model_type} model"
            raise ConfigError([Problem("config.model_type", family, remedy)], where="the translation")
        if isinstance(config, TransformerSpec):
            return config
        return self.family.spec(config, objective=head.form.objective)

    def _inferred(self, head: FamilyHead, full: Mapping[str, _Given[T]]) -> TransformerSpec:
        """The spec that tensors under Hugging Face's full names say; equal ends are tied."""
        rules = self.family.rules(head.form.objective)
        shapes = canonical_shapes(rules, {name: tensor.shape for name, tensor in full.items()})
        ends = [full.get(rule.hf) for rule in rules if rule.canonical in ((TOKENS,), (OUTPUT,))]
        tokens, output = ends if len(ends) == 2 else (None, None)
        if output is not None and (tokens is None or self._same(tokens, output)):
            shapes[TOKENS] = shapes.pop(OUTPUT)
        return infer_spec(self.family, head, shapes)

    def _same(self, one: _Given[T], other: _Given[T]) -> bool:
        return one.shape == other.shape and self.arrays.equal(one.value, other.value)

    def _shorten(
        self, values: dict[str, T], spec: TransformerSpec, max_seq_len: int | None, config: object
    ) -> TransformerSpec:
        """Leave `max_seq_len` positions in `values`, and say what that makes of `spec`."""
        if POSITIONS not in values:  # and without a configuration nothing says how many there are
            return spec if config is None else spec.shortened(max_seq_len)
        short = spec.shortened(max_seq_len)
        if short != spec:
            values[POSITIONS] = cast("Any", values[POSITIONS])[: short.position_rows]
        return short

    # -- names ------------------------------------------------------------------------------------------------------

    def _with_prefix(self, name: str) -> str:
        """The name that a model with a head gives the tensor."""
        prefix = self.family.prefix
        outside = {rule.hf for head in self.family.heads for rule in head.rules}
        return name if name.startswith(prefix) or name in outside else prefix + name

    def _in_memory(self, name: str) -> str:
        """The name that the tensor has in transformers' module, which may not be that in files."""
        for stored, held in self.family.in_memory.items():
            name = name.replace(stored, held)
        return name

    # -- arrays -----------------------------------------------------------------------------------------------------

    def _given(self, value: object) -> _Given[T]:
        array = self.arrays.read(value)
        return _Given(array, tuple(int(size) for size in cast("Any", array).shape))

    def _untied(self, tensors: Iterable[TensorDescription], values: Mapping[str, T]) -> dict[str, T]:
        """`values`, the tied ones being their owners'. Raises CheckpointError when there are both and they differ."""
        owners = {tensor.name: tensor.tied_to for tensor in tensors if tensor.tied_to is not None}
        problems = [
            f"{name} and {owner} differ, and the configuration has tie_word_embeddings = true"
            for name, owner in owners.items()
            if name in values and not self.arrays.equal(values[name], values[owner])
        ]
        if problems:
            raise self._refusal(problems)
        return {**values, **{name: values[owner] for name, owner in owners.items()}}

    def _join(self, tensor: HfTensor, values: Mapping[str, T]) -> T:
        """A Hugging Face tensor from its parts."""
        if len(tensor.parts) == 1:
            return self._turn(tensor, values[tensor.parts[0].name])
        axis = -1 if tensor.transpose else 0
        pieces: dict[int, T] = {}
        for part in tensor.parts:
            for there, here in tensor.pieces(part, (0,) * len(part.shape), part.shape):
                pieces[there[axis].start] = self._turn(tensor, cast("Any", values[part.name])[here])
        return self.arrays.join([pieces[start] for start in sorted(pieces)], 1 if tensor.transpose else 0)

    def _part(self, tensor: HfTensor, part: TensorDescription, value: T) -> T:
        """One of its parts from a Hugging Face tensor."""
        if len(tensor.parts) == 1:
            return self._turn(tensor, value)
        pieces = [
            self._turn(tensor, cast("Any", value)[there])
            for there, _ in tensor.pieces(part, (0,) * len(part.shape), part.shape)
        ]
        return pieces[0] if len(pieces) == 1 else self.arrays.join(pieces, 0)

    def _turn(self, tensor: HfTensor, value: T) -> T:
        return self.arrays.transpose(value) if tensor.transpose else value

    def _refusal(self, problems: Sequence[str]) -> CheckpointError:
        heading = f"these are not all and only the tensors of a {self.family.model_type} model:"
        return CheckpointError("\n  ".join([heading, *problems]))


def _under_each_name(family: Family, spec: TransformerSpec) -> Iterable[HfTensor]:
    """The tensors of transformers' model. It holds what is tied under each name, where files have one of them."""
    found: dict[str, HfTensor] = {}
    for tied in (False,) if spec.head.classifies else (not spec.tied, spec.tied):
        description = describe_spec(spec.model_copy(update={"tied": tied}))
        found |= {
            tensor.name: tensor for tensor in hf_tensors(family.rules(spec.head.objective), description)
        }
    return found.values()


def _maker(config: object) -> str:
    return "the model's other tensors make" if config is None else "the configuration makes"
