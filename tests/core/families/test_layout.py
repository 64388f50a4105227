"""Weight rules against plain numpy: joins, interleaving, transposes, and any slice of them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from mpsdk.errors import MpsdkError
from mpsdk.families import TransformerSpec, family_of
from mpsdk.families.describe import describe_spec
from mpsdk.families.layout import HfTensor, hf_tensors
from mpsdk.families.rules import WeightRule
from tests.core.families.configurations import GPT2, LLAMA, specs

Array = NDArray[np.float32]
QUERY_KEY_VALUE = tuple(f"blocks.{{block}}.attention.{name}.weight" for name in ("query", "key", "value"))


def whole(tensor: HfTensor, parts: list[Array]) -> Array:
    """`tensor` as numpy makes it: groups of each part side by side."""
    groups = [part.reshape(tensor.groups, part.shape[0] // tensor.groups, *part.shape[1:]) for part in parts]
    joined = np.concatenate(groups, axis=1).reshape(-1, *parts[0].shape[1:])
    return joined.T if tensor.transpose else joined


def numbered(tensor: HfTensor) -> list[Array]:
    """Parts whose elements are all different."""
    start = 0
    parts: list[Array] = []
    for part in tensor.parts:
        parts.append(np.arange(start, start + part.elements, dtype=np.float32).reshape(part.shape))
        start += part.elements
    return parts


@st.composite
def tensors_and_slices(draw: st.DrawFn) -> tuple[HfTensor, int, tuple[slice, ...]]:
    spec = draw(specs)
    fused = WeightRule(
        "fused.{block}",
        QUERY_KEY_VALUE,
        transpose=draw(st.booleans()),
        interleaved_by=draw(st.sampled_from([None, "heads", "key_value_heads"])),
    )
    if fused.interleaved_by == "heads" and spec.key_value_heads != spec.heads:
        fused = WeightRule(fused.hf, fused.canonical, fused.transpose, "key_value_heads")
    family = family_of(spec.family)
    rules = family.rules(spec.head.objective)
    rest = [rule for rule in rules if not set(rule.canonical) & set(QUERY_KEY_VALUE)]
    tensor = draw(st.sampled_from(hf_tensors([fused, *rest], describe_spec(spec))))
    number = draw(st.integers(0, len(tensor.parts) - 1))
    bounds = [
        sorted(draw(st.tuples(st.integers(0, n), st.integers(0, n)))) for n in tensor.parts[number].shape
    ]
    return tensor, number, tuple(slice(start, end) for start, end in bounds)


@given(case=tensors_and_slices())
def test_any_slice_of_a_part_is_found_in_the_whole(case: tuple[HfTensor, int, tuple[slice, ...]]):
    tensor, number, index = case
    parts = numbered(tensor)
    stored = whole(tensor, parts)
    assert stored.shape == tensor.shape
    expected = parts[number][index]
    found = np.full_like(expected, np.nan)
    offset = tuple(bounds.start for bounds in index)
    for there, here in tensor.pieces(tensor.parts[number], offset, expected.shape):
        found[here] = tensor.turn(stored[there])
    np.testing.assert_array_equal(found, expected)


def test_a_transposed_slice_reads_no_more_than_its_own_elements():
    (tensor,) = (
        t
        for t in hf_tensors(family_of("gpt2").rules("causal-lm"), describe_spec(family_of("gpt2").spec(GPT2)))
        if t.name == "transformer.h.1.attn.c_attn.weight"
    )
    pieces = list(tensor.pieces(tensor.parts[1], (2, 3), (4, 5)))
    assert pieces == [((slice(3, 8), slice(10, 14)), (slice(0, 4),))]


@given(spec=specs)
def test_a_familys_rules_cover_every_tensor_once(spec: TransformerSpec):
    description = describe_spec(spec)
    tensors = hf_tensors(family_of(spec.family).rules(spec.head.objective), description)
    covered = [part.name for tensor in tensors for part in tensor.parts]
    assert sorted(covered) == sorted(tensor.name for tensor in description.tensors())
    assert len({tensor.name for tensor in tensors}) == len(tensors)


def test_tensors_come_in_the_order_of_the_model():
    names = [
        tensor.name
        for tensor in hf_tensors(
            family_of("llama").rules("causal-lm"), describe_spec(family_of("llama").spec(LLAMA))
        )
    ]
    assert names[0] == "model.embed_tokens.weight"
    assert names[1] == "model.layers.0.input_layernorm.weight"
    assert names.index("model.layers.0.mlp.down_proj.weight") < names.index(
        "model.layers.1.input_layernorm.weight"
    )
    assert names[-2:] == ["model.norm.weight", "lm_head.weight"]


def test_a_canonical_tensor_without_a_rule_is_named():
    description = describe_spec(family_of("gpt2").spec(GPT2))
    rules = [rule for rule in family_of("gpt2").rules("causal-lm") if "wpe" not in rule.hf]
    with pytest.raises(MpsdkError, match=r"no weight rule of 'gpt2' covers \['embedding.positions.weight'\]"):
        hf_tensors(rules, description)


def test_a_rule_that_joins_a_tensor_that_the_model_lacks_is_named():
    description = describe_spec(family_of("gpt2").spec(GPT2))
    rule = WeightRule(
        "x.{block}", ("blocks.{block}.feed_forward.up.weight", "blocks.{block}.feed_forward.gate.weight")
    )
    with pytest.raises(MpsdkError, match="the model has only some of these"):
        hf_tensors([rule, *family_of("gpt2").rules("causal-lm")], description)
