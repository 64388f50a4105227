"""Which of the tensors that were found is which of a model's, and what doesn't fit: in files and in state dicts alike."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Protocol, TypeVar

from mpsdk.families.family import Family
from mpsdk.families.layout import HfTensor
from mpsdk.families.spec import TransformerSpec


class Found(Protocol):
    """A tensor that was found, whatever holds its values."""

    @property
    def shape(self) -> tuple[int, ...]: ...


T = TypeVar("T", bound=Found)


def respelt(name: str, family: Family) -> str:
    """The name as today's files spell it."""
    for older, newer in family.spellings.items():
        name = name.replace(older, newer)
    for stored, held in family.in_memory.items():
        name = name.replace(held, stored)
    return name


def match(tensors: tuple[HfTensor, ...], found: Mapping[str, T], prefix: str) -> dict[str, T]:
    """What was found of each expected tensor, under its full name or, as base models are saved, without the prefix."""
    matched: dict[str, T] = {}
    for tensor in tensors:
        for name in (tensor.name, tensor.name.removeprefix(prefix)):
            if name in found:
                matched[tensor.name] = found[name]
                break
    return matched


def left_out(tensors: tuple[HfTensor, ...], matched: Mapping[str, Found]) -> Iterator[str]:
    """Every expected tensor that is not there, unless what it is tied to is."""
    present = {part.name for tensor in tensors if tensor.name in matched for part in tensor.parts}
    tied = {part.tied_to: part.name for tensor in tensors for part in tensor.parts if part.tied_to}
    for tensor in tensors:
        if tensor.name in matched or tensor.tied:
            continue
        if all(tied.get(part.name) in present for part in tensor.parts):
            continue  # its tied twin is there
        yield f"missing: {tensor.name} {tensor.shape}"


def misshapen(
    tensors: tuple[HfTensor, ...], matched: Mapping[str, Found], *, maker: str = "the configuration makes"
) -> Iterator[str]:
    """Every tensor of another shape than expected; `maker` says what expects it."""
    for tensor in tensors:
        if tensor.name in matched and matched[tensor.name].shape != tensor.shape:
            found = matched[tensor.name].shape
            yield f"wrong shape: {tensor.name} is {found}, {maker} it {tensor.shape}"


def left_over(
    found: Mapping[str, Found], matched: Mapping[str, Found], family: Family, spec: TransformerSpec
) -> Iterator[str]:
    """What belongs to no head of the family; the tensors of its other heads are passed over."""
    used = {id(tensor) for tensor in matched.values()}
    others = [rule.hf for head in family.heads for rule in head.rules]
    known = [_pattern(template, family.prefix) for template in (*family.ignored, *others)]
    for name, tensor in found.items():
        if id(tensor) in used or any(pattern.fullmatch(name) for pattern in known):
            continue
        yield f"unexpected: {name} {tensor.shape}, which a {family.model_type} model of {spec.blocks} blocks does not have"


def _pattern(template: str, prefix: str) -> re.Pattern[str]:
    """A template of a tensor's name, with or without the prefix."""
    base = re.escape(template.removeprefix(prefix)).replace(re.escape("{block}"), r"\d+")
    return re.compile(f"({re.escape(prefix)})?{base}")
