"""Hugging Face configurations become specs and specs become configurations."""

from __future__ import annotations

import pytest
from hypothesis import given
from pydantic import ValidationError

from mpsdk.errors import ConfigError
from mpsdk.families import Dropout, Rotary, TransformerSpec, family_of
from tests.core.families.configurations import GPT2, LLAMA, specs


def problems(config: dict[str, object], *, exhaustive: bool = False) -> dict[str, str]:
    """Field and remedy of each problem that reading `config` gives."""
    with pytest.raises(ConfigError) as caught:
        family_of(str(config["model_type"])).spec(config, exhaustive=exhaustive)
    return {problem.field: problem.remedy for problem in caught.value.problems}


def test_gpt2_configuration_becomes_a_spec():
    spec = family_of("gpt2").spec(GPT2, exhaustive=True)
    assert (spec.hidden_size, spec.blocks, spec.heads, spec.head_size, spec.vocab_size) == (8, 2, 2, 4, 31)
    assert spec.feed_forward_size == 32  # n_inner null means four times n_embd
    assert (spec.norm, spec.positions, spec.activation, spec.gated) == (
        "layernorm",
        "learned",
        "gelu_tanh",
        False,
    )
    assert spec.dropout == Dropout(embedding=0.2, attention=0.1, residual=0.3)
    assert spec.tied and spec.scale_residual_initialisation


def test_llama_configuration_becomes_a_spec():
    spec = family_of("llama").spec(LLAMA, exhaustive=True)
    assert (spec.heads, spec.key_value_heads, spec.head_size, spec.feed_forward_size) == (4, 2, 4, 24)
    assert (spec.norm, spec.positions, spec.activation, spec.gated) == ("rmsnorm", "rotary", "silu", True)
    assert spec.rotary == Rotary(theta=10000.0)
    assert not spec.tied and not spec.attention_bias


@pytest.mark.parametrize(
    "model_type, parameters", [("gpt2", 124_439_808), ("llama", 6_738_415_616)], ids=["gpt2", "llama-7b"]
)
def test_an_empty_configuration_is_the_published_base_model(model_type: str, parameters: int):
    from mpsdk.families.describe import describe_spec

    assert describe_spec(family_of(model_type).spec({})).parameters == parameters


@given(spec=specs)
def test_a_spec_survives_being_written_and_read(spec: TransformerSpec):
    family = family_of(spec.family)
    assert family.spec(family.hf_config(spec), exhaustive=True) == spec


@pytest.mark.parametrize(
    "older, scaling",
    [
        ({"rope_theta": 5e5, "rope_scaling": None}, None),
        ({"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}}, ("linear", 2.0)),
        (
            {
                "rope_theta": 5e5,
                "rope_scaling": {
                    "rope_type": "llama3",
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 32,
                },
            },
            ("llama3", 8.0, 1.0, 4.0, 32.0),
        ),
    ],
)
def test_transformers_4_says_rotary_settings_in_other_fields(
    older: dict[str, object], scaling: tuple[str | float, ...] | None
):
    config = {name: value for name, value in LLAMA.items() if name != "rope_parameters"}
    spec = family_of("llama").spec({**config, **older}, exhaustive=True)
    assert spec.rotary == Rotary(theta=5e5, scaling=scaling)


def test_llama3_scaling_starts_from_the_models_own_positions_unless_it_says_otherwise():
    rope = {"rope_type": "llama3", "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4}
    spec = family_of("llama").spec({**LLAMA, "rope_parameters": rope})
    assert spec.rotary == Rotary(theta=10000.0, scaling=("llama3", 8.0, 1.0, 4.0, 64.0))


def test_transformers_names_for_any_model_are_accepted_for_gpt2():
    spec = family_of("gpt2").spec(
        {"hidden_size": 12, "num_attention_heads": 3, "num_hidden_layers": 5}, exhaustive=True
    )
    assert (spec.hidden_size, spec.heads, spec.blocks) == (12, 3, 5)


def test_every_unsupported_gpt2_setting_is_listed_at_once():
    found = problems(
        {
            **GPT2,
            "n_head": 3,
            "activation_function": "quick_gelu",
            "scale_attn_weights": False,
            "scale_attn_by_inverse_layer_idx": True,
            "reorder_and_upcast_attn": True,
            "add_cross_attention": True,
            "quantization_config": {"bits": 4},
        }
    )
    assert set(found) == {
        "model.n_head",
        "model.activation_function",
        "model.scale_attn_weights",
        "model.scale_attn_by_inverse_layer_idx",
        "model.reorder_and_upcast_attn",
        "model.add_cross_attention",
        "model.quantization_config",
    }
    assert found["model.n_head"] == "must divide n_embd = 8"
    assert "gelu_new" in found["model.activation_function"]


def test_every_unsupported_llama_setting_is_listed_at_once():
    found = problems(
        {
            **LLAMA,
            "num_key_value_heads": 3,
            "head_dim": 5,
            "pretraining_tp": 2,
            "hidden_act": "swiglu",
            "rope_parameters": {"rope_type": "yarn", "factor": 2.0, "partial_rotary_factor": 0.5},
        }
    )
    assert set(found) == {
        "model.num_key_value_heads",
        "model.head_dim",
        "model.pretraining_tp",
        "model.hidden_act",
        "model.rope_parameters.rope_type",
        "model.rope_parameters.partial_rotary_factor",
    }
    assert "default, linear, llama3" in found["model.rope_parameters.rope_type"]


@pytest.mark.parametrize(
    "rope, field",
    [
        ({"rope_type": "linear"}, "factor"),
        ({"rope_type": "linear", "factor": -1.0}, "factor"),
        ({"rope_type": "default", "factor": 2.0}, "factor"),
        (
            {"rope_type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 4},
            "high_freq_factor",
        ),
        ({"rope_theta": 0}, "rope_theta"),
    ],
)
def test_a_rotary_setting_that_cannot_be_is_named_with_its_field(rope: dict[str, object], field: str):
    assert set(problems({**LLAMA, "rope_parameters": rope})) == {f"model.rope_parameters.{field}"}


def test_heads_may_have_a_size_of_their_own():
    spec = family_of("llama").spec({**LLAMA, "head_dim": 6})
    assert spec.heads * spec.head_size != spec.hidden_size


@pytest.mark.parametrize(
    "value, remedy",
    [
        ("12", "must be a whole number, at least 1"),
        (True, "must be a whole number, at least 1"),
        (0, "must be a whole number, at least 1"),
        (2.0, "must be a whole number, at least 1"),
    ],
)
def test_a_size_is_a_whole_number(value: object, remedy: str):
    assert problems({**GPT2, "n_layer": value}) == {"model.n_layer": remedy}


def test_a_number_that_yaml_takes_for_text_says_how_to_write_it():
    found = problems({**LLAMA, "rms_norm_eps": "1e-5"})
    assert found["model.rms_norm_eps"].endswith("write 1.0e-05")


@pytest.mark.parametrize("value", [-0.1, 1.0, "half", None])
def test_a_dropout_is_a_probability_below_one(value: object):
    if value is None:
        assert family_of("gpt2").spec({**GPT2, "attn_pdrop": None}).dropout.attention == 0.1
    else:
        assert set(problems({**GPT2, "attn_pdrop": value})) == {"model.attn_pdrop"}


def test_an_unknown_field_is_a_problem_only_in_a_configuration_written_by_hand():
    config = {**GPT2, "n_layers": 3}
    assert family_of("gpt2").spec(config).blocks == 2
    assert "did you mean 'n_layer'?" in problems(config, exhaustive=True)["model.n_layers"]


def test_a_family_refuses_to_write_a_spec_that_it_cannot_express():
    spec = (
        family_of("llama").spec(LLAMA).model_copy(update={"dropout": Dropout(residual=0.1), "gated": False})
    )
    with pytest.raises(ConfigError) as caught:
        family_of("llama").hf_config(spec)
    assert {problem.field for problem in caught.value.problems} == {"spec.dropout", "spec.gated"}


def test_an_unknown_family_suggests_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'llama'"):
        family_of("lama")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"key_value_heads": 3}, "must divide heads"),
        ({"rotary": None}, "rotary must be given"),
        ({"head_size": 5}, "must be even"),
    ],
)
def test_a_spec_that_does_not_fit_together_is_refused(change: dict[str, object], message: str):
    whole = family_of("llama").spec(LLAMA).model_dump()
    with pytest.raises(ValidationError, match=message):
        TransformerSpec.model_validate({**whole, **change})


@pytest.mark.parametrize("scaling", [("yarn", 2.0), ("linear",), ("linear", "two"), ("llama3", 8.0), ()])
def test_a_rotary_scaling_is_one_that_is_known(scaling: tuple[object, ...]):
    with pytest.raises(ValidationError, match="scaling"):
        Rotary.model_validate({"theta": 1e4, "scaling": scaling})
