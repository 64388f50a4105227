"""`nn.huggingface.<family>.translate_*` on dicts of numpy arrays and of TensorFlow's tensors and variables."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from mpsdk.families import FAMILIES, read_model
from mpsdk.families.export import export
from mpsdk_tf import from_config
from mpsdk_tf.nn import huggingface
from mpsdk_tf.nn.huggingface import gptj, roberta
from mpsdk_tf.transformer import named_parameters
from tests.cases import EVERY_FAMILY
from tests.core.families.configurations import family_specs
from tests.core.families.test_translate import canonical
from tests.core.families.test_weights import random_source


def functions(family: str) -> tuple[Any, Any]:
    """To Hugging Face, and from there, by their published names."""
    name = family.replace("_", "")
    module = importlib.import_module(f"mpsdk_tf.nn.huggingface.{name}")
    return (
        getattr(module, f"translate_state_dict_to_hf_{name}"),
        getattr(module, f"translate_hf_state_dict_to_smdistributed_{name}"),
    )


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(
        np.array_equal(np.asarray(one[name]), np.asarray(other[name])) for name in one
    )


@pytest.mark.parametrize("kind", ["array", "tensor", "variable"])
@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(data=st.data())
def test_a_state_dict_survives_the_way_there_and_back_bit_for_bit(kind: str, data: st.DataObject) -> None:
    """Arrays stay arrays; the rest becomes tensors."""
    spec = data.draw(family_specs())
    make = {"array": np.asarray, "tensor": tf.constant, "variable": tf.Variable}[kind]
    state = canonical(spec)
    to_hf, from_hf = functions(spec.family)
    there = to_hf({name: make(values) for name, values in state.items()}, config=spec)
    assert all(isinstance(values, np.ndarray if kind == "array" else tf.Tensor) for values in there.values())
    assert same(from_hf(there, config=spec), state)


@pytest.mark.parametrize("family", EVERY_FAMILY)
def test_a_file_of_transformers_fills_a_keras_model_and_the_models_variables_make_the_file(
    family: str, tmp_path: Path
) -> None:
    config = EVERY_FAMILY[family]
    spec = read_model(config).spec
    stored = load_file(export(random_source(spec), spec, tmp_path / "hf") / "model.safetensors")
    to_hf, from_hf = functions(family)

    model = from_config(config)
    weights = from_hf(stored, config=config)
    variables = dict(named_parameters(model))
    assert weights.keys() == variables.keys()
    for name, variable in variables.items():
        variable.assign(weights[name])

    there = to_hf(variables, config=config)
    for name, values in stored.items():
        for part, held in FAMILIES[family].in_memory.items():
            name = name.replace(part, held)
        np.testing.assert_array_equal(there[name], values)


def test_arrays_are_not_copied_where_they_only_get_another_name_or_orientation() -> None:
    spec = read_model(EVERY_FAMILY["gpt2"]).spec
    state = canonical(spec)
    there = functions("gpt2")[0](state)
    assert there["lm_head.weight"] is state["embedding.tokens.weight"]
    assert np.shares_memory(
        there["transformer.h.1.mlp.c_fc.weight"], state["blocks.1.feed_forward.up.weight"]
    )


@pytest.mark.parametrize("dtype", [tf.float32, tf.bfloat16, tf.float16])
def test_tensors_keep_their_dtype_and_positions_are_cut(dtype: tf.DType) -> None:
    spec = read_model(EVERY_FAMILY["gpt2"]).spec
    state = {name: tf.cast(values, dtype) for name, values in canonical(spec).items()}
    there = functions("gpt2")[0](state, 8)
    assert {values.dtype for values in there.values()} == {dtype}
    assert there["transformer.wpe.weight"].shape[0] == 8


def test_every_family_has_a_module_with_the_names_that_pytorchs_has() -> None:
    assert sorted(huggingface.__all__) == sorted(family.replace("_", "") for family in FAMILIES)
    for family in FAMILIES:
        assert all(callable(function) for function in functions(family))
    assert callable(gptj.translate_hf_gptj_state_dict_to_smdistributed_gptj)
    assert callable(roberta.translate_state_dict_to_smdistributed)
