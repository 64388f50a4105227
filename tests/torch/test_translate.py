"""`nn.huggingface.<family>.translate_*` between transformers' own models and mpsdk's Transformer."""

from __future__ import annotations

import copy
import importlib
from typing import Any

import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from mpsdk.families import FAMILIES
from mpsdk_torch import from_config
from mpsdk_torch.nn import huggingface
from mpsdk_torch.nn.huggingface import gptj, gptneox, roberta
from mpsdk_torch.transformer import Transformer
from tests.cases import EVERY_FAMILY, EVERY_HEAD
from tests.family_configs import configs

State = dict[str, Tensor]


def functions(family: str) -> tuple[Any, Any]:
    """To Hugging Face, and from there, by their published names."""
    name = family.replace("_", "")
    module = importlib.import_module(f"mpsdk_torch.nn.huggingface.{name}")
    return (
        getattr(module, f"translate_state_dict_to_hf_{name}"),
        getattr(module, f"translate_hf_state_dict_to_smdistributed_{name}"),
    )


def model_of(config: dict[str, Any], objective: str) -> nn.Module:
    """transformers' class for the head, all of its weights random."""
    family = FAMILIES[config["model_type"]]
    (head,) = (each for each in family.heads if each.form.objective == objective)
    fields = {name: value for name, value in config.items() if name != "model_type"}
    made = transformers.AutoConfig.for_model(family.model_type, **fields)
    torch.manual_seed(0)
    model: nn.Module = getattr(transformers, head.architecture)(made).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model


def same(one: State, other: State) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def of(family: str, **settings: object) -> dict[str, Any]:
    """A small configuration of the family."""
    return EVERY_FAMILY[family] | {"pad_token_id": 1 if family == "roberta" else 0} | settings


@pytest.mark.parametrize("name", EVERY_HEAD)
@settings(max_examples=4, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(data=st.data())
def test_either_models_state_dict_loads_into_the_other_and_comes_back_bit_for_bit(
    name: str, data: st.DataObject
) -> None:
    """Every key, in both directions, over random configurations; shapes say enough, but where heads alternate."""
    family, _, objective = name.partition("-")
    theirs: Any = model_of(data.draw(configs(family)), objective)
    to_hf, from_hf = functions(family)
    given_config = {"config": theirs.config} if family == "gpt_neox" or data.draw(st.booleans()) else {}

    ours = Transformer(FAMILIES[family].spec(theirs.config.to_dict(), objective=objective))  # type: ignore[arg-type]
    ours.load_state_dict(from_hf(theirs.state_dict(), **given_config), strict=True)
    there = to_hf(ours.state_dict(), **given_config)

    again = copy.deepcopy(theirs)
    with torch.no_grad():
        for parameter in again.parameters():
            parameter.zero_()
    again.load_state_dict(there, strict=True)
    ids = torch.arange(6)[None] + 2
    assert torch.equal(again(ids).logits, theirs(ids).logits)
    assert same(from_hf(again.state_dict(), **given_config), dict(ours.state_dict()))


def test_every_family_has_a_module_with_the_two_functions() -> None:
    assert sorted(huggingface.__all__) == sorted(family.replace("_", "") for family in FAMILIES)
    for family in FAMILIES:
        assert all(callable(function) for function in functions(family))


def test_names_that_the_documentation_has_beside_are_the_same_functions() -> None:
    assert (
        gptj.translate_hf_gptj_state_dict_to_smdistributed_gptj
        == gptj.translate_hf_state_dict_to_smdistributed_gptj
    )
    assert (
        roberta.translate_state_dict_to_smdistributed
        == roberta.translate_hf_state_dict_to_smdistributed_roberta
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_tensors_keep_their_dtype_and_their_memory(dtype: torch.dtype) -> None:
    to_hf, from_hf = functions("gpt2")
    state = model_of(of("gpt2"), "causal-lm").to(dtype).state_dict()
    here = from_hf(state)
    assert {tensor.dtype for tensor in here.values()} == {dtype}
    memory = {tensor.untyped_storage().data_ptr() for tensor in state.values()}
    assert {tensor.untyped_storage().data_ptr() for tensor in here.values()} <= memory
    assert same(to_hf(here), dict(state))


def test_parameters_are_taken_as_their_values() -> None:
    to_hf, from_hf = functions("llama")
    model = from_config(of("llama"))
    there = to_hf(dict(model.named_parameters()))
    assert not any(tensor.requires_grad for tensor in there.values())
    assert same(from_hf(there), dict(model.state_dict()))


def test_the_published_example_loads_fewer_positions_into_a_shorter_model() -> None:
    """`translate_state_dict_to_hf_gpt2(state_dict, max_seq_len)`."""
    config = of("gpt2")
    short = model_of(config | {"n_positions": 8}, "causal-lm")
    there = functions("gpt2")[0](from_config(config).state_dict(), 8)
    short.load_state_dict(there)
    assert there["transformer.wpe.weight"].shape[0] == 8


def test_tied_weights_are_told_from_the_tensors_themselves() -> None:
    from_hf = functions("llama")[1]
    for tied in (True, False):
        state = model_of(of("llama", tie_word_embeddings=tied), "causal-lm").state_dict()
        assert ("head.output.weight" in from_hf(state)) == (not tied)
        saved = {name: tensor.clone() for name, tensor in state.items()}  # as a file gives them back
        assert ("head.output.weight" in from_hf(saved)) == (not tied)


def test_tensors_without_values_are_translated_by_their_configuration() -> None:
    with torch.device("meta"):
        theirs: Any = model_of(of("gpt_neox"), "causal-lm")
    here = gptneox.translate_hf_state_dict_to_smdistributed_gptneox(theirs.state_dict(), config=theirs.config)
    assert all(tensor.is_meta for tensor in here.values())
    there = gptneox.translate_state_dict_to_hf_gptneox(here, config=theirs.config)
    assert {name: tensor.shape for name, tensor in there.items()} == {
        name: tensor.shape for name, tensor in theirs.state_dict().items()
    }
