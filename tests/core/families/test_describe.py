"""A spec's tensors: names, shapes, roles, first values."""

from __future__ import annotations

import math

from hypothesis import given

from mpsdk.families import TransformerSpec, family_of
from mpsdk.families.describe import describe_spec
from tests.core.families.configurations import GPT2, LLAMA, specs


def test_gpt2_tensors():
    description = describe_spec(family_of("gpt2").spec(GPT2))
    found = {
        tensor.name: (tensor.shape, tensor.role)
        for tensor in description.tensors()
        if tensor.block in (None, 1)
    }
    prefix = "blocks.1."
    assert found == {
        "embedding.tokens.weight": ((31, 8), "vocab"),
        "embedding.positions.weight": ((16, 8), "replicated"),
        prefix + "attention_norm.weight": ((8,), "replicated"),
        prefix + "attention_norm.bias": ((8,), "replicated"),
        prefix + "attention.query.weight": ((8, 8), "column"),
        prefix + "attention.query.bias": ((8,), "column"),
        prefix + "attention.key.weight": ((8, 8), "column"),
        prefix + "attention.key.bias": ((8,), "column"),
        prefix + "attention.value.weight": ((8, 8), "column"),
        prefix + "attention.value.bias": ((8,), "column"),
        prefix + "attention.output.weight": ((8, 8), "row"),
        prefix + "attention.output.bias": ((8,), "replicated"),
        prefix + "feed_forward_norm.weight": ((8,), "replicated"),
        prefix + "feed_forward_norm.bias": ((8,), "replicated"),
        prefix + "feed_forward.up.weight": ((32, 8), "column"),
        prefix + "feed_forward.up.bias": ((32,), "column"),
        prefix + "feed_forward.down.weight": ((8, 32), "row"),
        prefix + "feed_forward.down.bias": ((8,), "replicated"),
        "head.norm.weight": ((8,), "replicated"),
        "head.norm.bias": ((8,), "replicated"),
        "head.output.weight": ((31, 8), "vocab"),
    }


def test_llama_tensors():
    description = describe_spec(family_of("llama").spec(LLAMA))
    found = {
        tensor.name: (tensor.shape, tensor.role)
        for tensor in description.tensors()
        if tensor.block in (None, 0)
    }
    prefix = "blocks.0."
    assert found == {
        "embedding.tokens.weight": ((31, 16), "vocab"),
        prefix + "attention_norm.weight": ((16,), "replicated"),
        prefix + "attention.query.weight": ((16, 16), "column"),
        prefix + "attention.key.weight": ((8, 16), "column"),
        prefix + "attention.value.weight": ((8, 16), "column"),
        prefix + "attention.output.weight": ((16, 16), "row"),
        prefix + "feed_forward_norm.weight": ((16,), "replicated"),
        prefix + "feed_forward.up.weight": ((24, 16), "column"),
        prefix + "feed_forward.gate.weight": ((24, 16), "column"),
        prefix + "feed_forward.down.weight": ((16, 24), "row"),
        "head.norm.weight": ((16,), "replicated"),
        "head.output.weight": ((31, 16), "vocab"),
    }


def test_cuts_fall_between_heads_and_between_features():
    tensors = {tensor.name: tensor for tensor in describe_spec(family_of("llama").spec(LLAMA)).tensors()}
    cuts = {
        name: (tensors[f"blocks.0.{name}.weight"].units, tensors[f"blocks.0.{name}.weight"].unit)
        for name in ("attention.query", "attention.key", "attention.output", "feed_forward.down")
    }
    assert cuts == {
        "attention.query": (4, "heads"),
        "attention.key": (2, "key_value_heads"),
        "attention.output": (4, "heads"),
        "feed_forward.down": (24, "feed_forward_size"),
    }


@given(spec=specs)
def test_a_cut_dimension_is_a_whole_number_of_units(spec: TransformerSpec):
    for tensor in describe_spec(spec).tensors():
        if tensor.units is not None:
            assert tensor.cut_dimension is not None
            assert tensor.shape[tensor.cut_dimension] % tensor.units == 0


@given(spec=specs)
def test_weights_decay_and_start_at_random_biases_and_norms_do_neither(spec: TransformerSpec):
    for tensor in describe_spec(spec).tensors():
        plain = tensor.name.endswith(".bias") or "norm." in tensor.name
        assert tensor.decay == (not plain)
        kind = "normal" if not plain else "zeros" if tensor.name.endswith(".bias") else "ones"
        assert tensor.initial.kind == kind


def test_gpt2_scales_what_goes_into_the_residual_stream_by_depth():
    tensors = {tensor.name: tensor for tensor in describe_spec(family_of("gpt2").spec(GPT2)).tensors()}
    for name, std in {
        "attention.query": 0.02,
        "attention.output": 0.02 / math.sqrt(4),
        "feed_forward.down": 0.02 / math.sqrt(4),
    }.items():
        assert tensors[f"blocks.0.{name}.weight"].initial.std == std


def test_a_tied_head_names_its_owner_and_counts_once():
    tied = describe_spec(family_of("gpt2").spec(GPT2))
    untied = describe_spec(family_of("gpt2").spec({**GPT2, "tie_word_embeddings": False}))
    (head,) = (tensor for tensor in tied.tensors() if tensor.name == "head.output.weight")
    assert head.tied_to == "embedding.tokens.weight"
    assert untied.parameters - tied.parameters == 31 * 8
