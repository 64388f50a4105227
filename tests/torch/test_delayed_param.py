"""Delayed initialisation in one process: where memory comes from, what has which value, what is left out."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mpsdk_torch import delay_param_initialization, from_config
from mpsdk_torch.delayed_param import DelayedParamIniter
from mpsdk_torch.transformer import Transformer
from tests.torch.pool import WorkerPool
from tests.torch.spreading import CONFIGS, finetune, make_model, start_cut_and_sharded, start_sharded

GPT2 = {"model_type": "gpt2", "n_layer": 2, "n_embd": 32, "n_head": 4, "vocab_size": 61, "n_positions": 16}


def on_meta(model: nn.Module) -> set[str]:
    return {name for name, tensor in model.state_dict(keep_vars=True).items() if tensor.is_meta}


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.norm = nn.BatchNorm1d(4)
        self.output = nn.Linear(4, 5, bias=False)
        self.output.weight = self.embedding.weight
        self.output.weight.requires_grad_(False)


def test_parameters_are_delayed_and_buffers_are_not() -> None:
    with delay_param_initialization():
        model = Tied()
    assert on_meta(model) == {"embedding.weight", "norm.weight", "norm.bias", "output.weight"}
    assert model.output.weight is model.embedding.weight
    assert not model.output.weight.requires_grad
    assert model.norm.running_var.tolist() == [1.0] * 4
    assert not on_meta(Tied())


def test_it_decorates_a_function_and_can_be_switched_off() -> None:
    @delay_param_initialization()
    def make() -> nn.Module:
        return nn.Linear(2, 2)

    assert on_meta(make()) == {"weight", "bias"}
    assert on_meta(make()) == {"weight", "bias"}
    with delay_param_initialization(enabled=False):
        assert not on_meta(nn.Linear(2, 2))


@pytest.mark.parametrize("buffers_too", [False, True], ids=["parameters", "buffers-too"])
@pytest.mark.parametrize("name", CONFIGS)
def test_buffers_of_transformers_models_are_right_after_materialising(name: str, buffers_too: bool) -> None:
    with torch.device("meta") if buffers_too else delay_param_initialization():
        model = make_model(name)
    delayed = DelayedParamIniter(model)
    with delayed.validate_params_and_buffers_inited():
        model.apply(delayed.get_param_init_fn())
    expected = dict(make_model(name).named_buffers())
    found = dict(model.named_buffers())
    assert found.keys() == expected.keys()
    for buffer, values in expected.items():
        assert torch.equal(found[buffer], values), buffer
    for parameter, values in model.named_parameters():
        assert values.isfinite().all(), parameter


def test_ties_and_frozen_weights_stay() -> None:
    with delay_param_initialization():
        model = Tied()
    delayed = DelayedParamIniter(model)
    with delayed.validate_params_and_buffers_inited():
        model.apply(delayed.get_param_init_fn())
    delayed.get_post_param_init_fn()(model)
    assert model.output.weight is model.embedding.weight
    assert not model.output.weight.requires_grad
    assert model.norm.weight.tolist() == [1.0] * 4


def test_an_mpsdk_model_starts_as_a_run_does() -> None:
    whole = from_config(GPT2, seed=3)
    with torch.device("meta"):
        model = Transformer(whole.spec)
    model.apply(DelayedParamIniter(model, seed=3).get_param_init_fn())
    found = dict(model.named_parameters())
    for name, values in whole.named_parameters():
        assert torch.equal(found[name], values), name


def test_an_mpsdk_model_starts_as_a_run_does_when_it_is_cut_and_sharded(pool: WorkerPool) -> None:
    assert pool.run(4, start_cut_and_sharded, GPT2) == [[]] * 4


def test_a_sharded_model_of_transformers_starts_as_one_that_is_not(pool: WorkerPool) -> None:
    assert pool.run(2, start_sharded, "llama-tied") == [[]] * 2


@pytest.mark.parametrize("how", ["fsdp1", "fsdp2"])
@pytest.mark.parametrize("name", ["llama", pytest.param("gptj", marks=pytest.mark.long)])
def test_a_model_of_transformers_is_spread_from_rank_0(pool: WorkerPool, name: str, how: str) -> None:
    for rank, seen in enumerate(pool.run(2, finetune, name, how)):
        assert not seen.wrong
        assert seen.distance <= 1e-5
        assert rank == 0 or seen.peak < seen.elements


def test_ones_own_method_gives_the_values() -> None:
    def ones(module: nn.Module) -> None:
        for parameter in module.parameters(recurse=False):
            parameter.fill_(1.0)

    with delay_param_initialization():
        model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model.apply(DelayedParamIniter(model, ones).get_param_init_fn())
    assert all((parameter == 1.0).all() for parameter in model.parameters())


def test_what_nobody_gives_a_value_shows() -> None:
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3))

    with delay_param_initialization():
        model = Scale()
    model.apply(DelayedParamIniter(model).get_param_init_fn())
    assert model.scale.isnan().all()


def test_what_was_left_out_is_listed() -> None:
    with delay_param_initialization():
        model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    delayed = DelayedParamIniter(model)
    with pytest.raises(AssertionError) as caught, delayed.validate_params_and_buffers_inited():
        model[0].apply(delayed.get_param_init_fn())
    assert "1.weight is still on the meta device" in str(caught.value)
    assert "9 elements were initialised, and 17 waited for it" in str(caught.value)
    with delayed.validate_params_and_buffers_inited(enabled=False):
        pass


def test_parameters_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    with delay_param_initialization():
        model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    delayed = DelayedParamIniter(model, verbose=True)
    with caplog.at_level("INFO", logger="mpsdk_torch.delayed_param"):
        model.apply(delayed.get_param_init_fn())
    assert delayed.count_num_params(model) == 17
    assert "0: 9 of 17 elements initialised" in caplog.text
