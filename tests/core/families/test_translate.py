"""State dicts between Hugging Face's names and canonical ones, as numpy arrays."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from numpy.typing import NDArray
from safetensors.numpy import load_file

from mpsdk.errors import CheckpointError, ConfigError
from mpsdk.families import FAMILIES, TransformerSpec, family_of
from mpsdk.families.describe import describe_spec
from mpsdk.families.export import export
from mpsdk.families.translate import NUMPY, Translator
from tests.core.families.configurations import GPT2, LLAMA, family_specs, specs
from tests.core.families.test_weights import random_source

State = dict[str, NDArray[np.generic]]
NEOX = {
    "model_type": "gpt_neox",
    "vocab_size": 31,
    "hidden_size": 16,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "intermediate_size": 12,
    "rotary_pct": 0.5,
}
ENCODER = {
    "vocab_size": 31,
    "hidden_size": 8,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "intermediate_size": 12,
    "max_position_embeddings": 16,
}


def of(family: str) -> Translator[NDArray[np.generic]]:
    return Translator(FAMILIES[family], NUMPY)


def canonical(spec: TransformerSpec) -> State:
    """Random weights under canonical names, a tied tensor once, as a model's state dict has them."""
    source = random_source(spec)
    return {
        tensor.name: source.read(tensor.name, "weight", (0,) * len(tensor.shape), tensor.shape)
        for tensor in describe_spec(spec).tensors()
        if tensor.tied_to is None
    }


def same(one: Mapping[str, NDArray[np.generic]], other: Mapping[str, NDArray[np.generic]]) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


def needed(spec: TransformerSpec) -> TransformerSpec | None:
    """What a translator must be given beside the state dict."""
    counted = any(rule.interleaved_by for rule in FAMILIES[spec.family].body)
    return spec if counted else None


# -- there and back ----------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=50)
@given(spec=specs)
def test_a_state_dict_survives_the_way_there_and_back_bit_for_bit(spec: TransformerSpec):
    state = canonical(spec)
    for config in (spec, needed(spec)):
        there = of(spec.family).to_hugging_face(state, config=config)
        assert same(of(spec.family).from_hugging_face(there, config=config), state)


@settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(spec=family_specs())
def test_it_has_the_tensors_that_an_exported_directory_has(
    spec: TransformerSpec, tmp_path_factory: pytest.TempPathFactory
):
    family = FAMILIES[spec.family]
    out = export(random_source(spec), spec, tmp_path_factory.mktemp("model"))
    stored = load_file(out / "model.safetensors")
    held = of(spec.family).to_hugging_face(canonical(spec), config=needed(spec))
    spelt = {stored: held for stored, held in family.in_memory.items()}
    for name, values in stored.items():
        for part, in_memory in spelt.items():
            name = name.replace(part, in_memory)
        np.testing.assert_array_equal(held[name], values)
    assert same(of(spec.family).from_hugging_face(stored, config=needed(spec)), canonical(spec))


@settings(deadline=None, max_examples=15)
@given(spec=family_specs())
def test_names_of_the_base_model_are_understood(spec: TransformerSpec):
    prefix = FAMILIES[spec.family].prefix
    held = of(spec.family).to_hugging_face(canonical(spec), config=spec)
    bare = {name.removeprefix(prefix): values for name, values in held.items()}
    assert same(of(spec.family).from_hugging_face(bare, config=needed(spec)), canonical(spec))


def test_a_tied_tensor_comes_under_each_of_its_names_there_and_once_here():
    state = canonical(family_of("gpt2").spec(GPT2))
    there = of("gpt2").to_hugging_face(state)
    assert there["lm_head.weight"] is there["transformer.wte.weight"] is state["embedding.tokens.weight"]
    assert "head.output.weight" not in of("gpt2").from_hugging_face(there)
    for name in ("lm_head.weight", "transformer.wte.weight"):  # either will do
        one = {other: values for other, values in there.items() if other != name}
        assert same(of("gpt2").from_hugging_face(one), state)


def test_an_output_projection_of_its_own_stays_apart():
    spec = family_of("gpt2").spec(GPT2 | {"tie_word_embeddings": False})
    there = of("gpt2").to_hugging_face(canonical(spec))
    assert same(of("gpt2").from_hugging_face(there), canonical(spec))
    there["lm_head.weight"] = there["transformer.wte.weight"].copy()  # equal, and untied if that is said
    assert "head.output.weight" not in of("gpt2").from_hugging_face(there)
    assert "head.output.weight" in of("gpt2").from_hugging_face(there, config=spec)


@pytest.mark.parametrize("model_type", ["bert", "roberta"])
def test_the_bias_of_a_masked_language_model_comes_under_both_names(model_type: str):
    for tied in (True, False):
        spec = family_of(model_type).spec(ENCODER | {"tie_word_embeddings": tied})
        there = of(model_type).to_hugging_face(canonical(spec))
        names = [name for name, values in there.items() if values is canonical_bias(there)]
        assert len(names) == 2 and all(name.endswith(".bias") for name in names)


def canonical_bias(there: State) -> NDArray[np.generic]:
    return next(values for name, values in there.items() if name.endswith("decoder.bias"))


@pytest.mark.parametrize("name", ["embed_out", "lm_head"])
def test_gpt_neox_is_read_under_the_names_of_files_and_of_memory(name: str):
    spec = family_of("gpt_neox").spec(NEOX)
    there = of("gpt_neox").to_hugging_face(canonical(spec), config=NEOX)
    output = there.pop("lm_head.weight")
    assert same(
        of("gpt_neox").from_hugging_face({**there, f"{name}.weight": output}, config=NEOX), canonical(spec)
    )


def test_weights_are_not_copied_where_they_only_get_another_name_or_orientation():
    state = canonical(family_of("gpt2").spec(GPT2))
    there = of("gpt2").to_hugging_face(state)
    assert there["transformer.h.1.ln_1.weight"] is state["blocks.1.attention_norm.weight"]
    assert np.shares_memory(
        there["transformer.h.1.mlp.c_fc.weight"], state["blocks.1.feed_forward.up.weight"]
    )
    back = of("gpt2").from_hugging_face(there)
    fused = there["transformer.h.0.attn.c_attn.weight"]
    assert np.shares_memory(back["blocks.0.attention.key.weight"], fused)


@pytest.mark.parametrize("dtype", ["float16", "float64", "int8"])
def test_any_dtype_stays_what_it_is(dtype: str):
    state = {name: values.astype(dtype) for name, values in canonical(family_of("gpt2").spec(GPT2)).items()}
    there = of("gpt2").to_hugging_face(state)
    assert {values.dtype for values in there.values()} == {np.dtype(dtype)}
    assert same(of("gpt2").from_hugging_face(there), state)


# -- what files of other versions have -----------------------------------------------------------------------------------


def test_masks_other_heads_and_older_spellings_are_understood():
    spec = family_of("bert").spec(ENCODER)
    there = of("bert").to_hugging_face(canonical(spec))
    older = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): values
        for name, values in there.items()
    }
    others = {
        "bert.embeddings.position_ids": np.arange(16)[None],
        "bert.pooler.dense.weight": np.zeros((8, 8)),
        "bert.pooler.dense.bias": np.zeros(8),
        "cls.seq_relationship.weight": np.zeros((2, 8)),
        "cls.seq_relationship.bias": np.zeros(2),
    }
    assert same(of("bert").from_hugging_face(older | others), canonical(spec))


# -- positions -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model_type", "config", "table", "reserved"),
    [
        ("gpt2", GPT2, "transformer.wpe.weight", 0),
        ("bert", ENCODER, "bert.embeddings.position_embeddings.weight", 0),
        ("roberta", ENCODER, "roberta.embeddings.position_embeddings.weight", 2),
    ],
)
def test_max_seq_len_keeps_that_many_positions(
    model_type: str, config: dict[str, object], table: str, reserved: int
):
    """RoBERTa's table begins with rows that stand for no token."""
    state = canonical(family_of(model_type).spec(config))
    whole = of(model_type).to_hugging_face(state)
    short = of(model_type).to_hugging_face(state, 5)
    np.testing.assert_array_equal(short[table], whole[table][: 5 + reserved])
    assert {name for name in whole if short[name] is not whole[name]} >= {table}
    back = of(model_type).from_hugging_face(whole, max_seq_len=5)
    np.testing.assert_array_equal(back["embedding.positions.weight"], short[table])
    assert same(of(model_type).to_hugging_face(state, 16 - reserved), whole)


@pytest.mark.parametrize("positions", [0, 17])
def test_more_positions_than_there_are_are_refused(positions: int):
    state = canonical(family_of("gpt2").spec(GPT2))
    for translate, weights in (
        (of("gpt2").to_hugging_face, state),
        (of("gpt2").from_hugging_face, of("gpt2").to_hugging_face(state)),
    ):
        with pytest.raises(ConfigError, match=rf"max_seq_len \(got {positions}\): the model has 16"):
            translate(weights, positions)


def test_rotary_positions_have_no_table_to_cut_and_are_checked_where_the_configuration_says_how_many():
    state = canonical(family_of("llama").spec(LLAMA))
    assert same(of("llama").to_hugging_face(state, 9999), of("llama").to_hugging_face(state))
    with pytest.raises(ConfigError, match="the model has 64 positions"):
        of("llama").to_hugging_face(state, 9999, config=LLAMA)


# -- configurations ------------------------------------------------------------------------------------------------------


def test_a_configuration_may_be_fields_an_object_a_directory_or_a_spec(tmp_path: Path):
    spec = family_of("gpt_neox").spec(NEOX)
    directory = export(random_source(spec), spec, tmp_path / "m", hf_config=NEOX)
    config = SimpleNamespace(to_dict=lambda: NEOX)
    expected = of("gpt_neox").to_hugging_face(canonical(spec), config=spec)
    for given_config in (NEOX, config, directory, str(directory)):
        assert same(of("gpt_neox").to_hugging_face(canonical(spec), config=given_config), expected)


def test_a_configuration_with_another_head_is_that_of_the_same_body():
    spec = family_of("llama").spec(LLAMA, objective="token-classification")
    there = of("llama").to_hugging_face(canonical(spec), config=LLAMA)
    assert there["score.weight"].shape == (2, 16)
    assert same(of("llama").from_hugging_face(there, config=LLAMA), canonical(spec))


def test_a_configuration_of_another_family_is_refused():
    with pytest.raises(ConfigError, match=r"config.model_type \(got 'llama'\).*a gpt2 model"):
        of("gpt2").to_hugging_face(canonical(family_of("gpt2").spec(GPT2)), config=LLAMA)


def test_gpt_neox_asks_for_the_number_of_heads():
    state = canonical(family_of("gpt_neox").spec(NEOX))
    with pytest.raises(CheckpointError, match=r"alternates between heads.*configuration as config"):
        of("gpt_neox").to_hugging_face(state)


# -- what doesn't fit ----------------------------------------------------------------------------------------------------


def test_all_that_does_not_fit_is_listed_at_once_on_the_way_there():
    state = canonical(family_of("llama").spec(LLAMA))
    del state["head.norm.weight"]
    state["blocks.1.feed_forward.down.weight"] = np.zeros((24, 16))
    state["blocks.0.attention.rotary"] = np.zeros(4)
    with pytest.raises(CheckpointError) as caught:
        of("llama").to_hugging_face(state)
    assert str(caught.value).splitlines()[1:] == [
        "  missing: head.norm.weight (16,)",
        "  unexpected: blocks.0.attention.rotary (4,)",
        "  wrong shape: blocks.1.feed_forward.down.weight is (24, 16), the model's other tensors make it (16, 24)",
    ]


def test_all_that_does_not_fit_is_listed_at_once_on_the_way_here():
    there = of("llama").to_hugging_face(canonical(family_of("llama").spec(LLAMA)))
    del there["model.norm.weight"]
    there["model.layers.1.mlp.down_proj.weight"] = np.zeros((24, 16))
    there["model.layers.0.self_attn.rotary"] = np.zeros(4)
    with pytest.raises(CheckpointError) as caught:
        of("llama").from_hugging_face(there)
    assert str(caught.value).splitlines()[1:] == [
        "  missing: model.norm.weight (16,)",
        "  wrong shape: model.layers.1.mlp.down_proj.weight is (24, 16), "
        "the model's other tensors make it (16, 24)",
        "  unexpected: model.layers.0.self_attn.rotary (4,), which a llama model of 2 blocks does not have",
    ]


def test_a_tensor_that_the_family_always_has_is_missed_where_no_block_has_it():
    there = of("gpt2").to_hugging_face(canonical(family_of("gpt2").spec(GPT2)))
    bare = {name: values for name, values in there.items() if not name.endswith("c_attn.bias")}
    with pytest.raises(CheckpointError, match=r"missing: transformer.h.1.attn.c_attn.bias \(24,\)"):
        of("gpt2").from_hugging_face(bare)


def test_tied_tensors_that_differ_are_refused():
    state = canonical(family_of("gpt2").spec(GPT2))
    there = of("gpt2").to_hugging_face(state)
    there["lm_head.weight"] = np.zeros((31, 8))
    with pytest.raises(CheckpointError, match="differ, and the configuration has tie_word_embeddings = true"):
        of("gpt2").from_hugging_face(there, config=GPT2)
    with pytest.raises(CheckpointError, match="differ, and the configuration has tie_word_embeddings = true"):
        of("gpt2").to_hugging_face({**state, "head.output.weight": np.zeros((31, 8))}, config=GPT2)


@pytest.mark.parametrize("state", [{}, {"something.else": np.zeros(3)}])
def test_what_is_no_state_dict_of_the_family_is_refused(state: State):
    for translate in (of("llama").to_hugging_face, of("llama").from_hugging_face):
        with pytest.raises(CheckpointError, match=r"not the tensors of a llama model.*embedding\.tokens"):
            translate(state)
