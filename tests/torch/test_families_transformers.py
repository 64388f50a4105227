"""The families against transformers' own classes: configurations, tensor names and shapes, files, exported directories."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from mpsdk.errors import ConfigError
from mpsdk.families import family_of
from mpsdk.families.activations import ACTIVATIONS
from mpsdk.families.describe import describe_spec
from mpsdk.families.hf import HuggingFaceSource, export, read_model
from mpsdk.families.layout import hf_tensors
from mpsdk.families.rotary import inverse_frequencies
from mpsdk.initialise import RandomSource

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def gpt2(**settings: object) -> GPT2LMHeadModel:
    sizes = {"vocab_size": 61, "n_positions": 32, "n_embd": 16, "n_layer": 3, "n_head": 4}
    return GPT2LMHeadModel(GPT2Config(**{**sizes, "bos_token_id": 60, "eos_token_id": 60, **settings}))


def llama(**settings: object) -> LlamaForCausalLM:
    sizes = {
        "vocab_size": 61,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
    }
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **settings}))


MODELS = {
    "gpt2": gpt2,
    "gpt2-untied": lambda: gpt2(tie_word_embeddings=False, n_inner=40, activation_function="relu"),
    "llama": llama,
    "llama-grouped-tied": lambda: llama(num_key_value_heads=2, tie_word_embeddings=True),
    "llama-biases": lambda: llama(attention_bias=True, mlp_bias=True, rope_parameters=LLAMA3),
    "llama-wide-heads": lambda: llama(head_dim=6, num_key_value_heads=1),
}


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    """A model whose weights are all random, biases and norms too."""
    torch.manual_seed(0)
    made: PreTrainedModel = MODELS[request.param]()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_()
    return made


def opened(directory: Path) -> HuggingFaceSource:
    found = read_model(directory)
    return HuggingFaceSource(directory, found.family, found.spec)


def loaded(directory: Path) -> PreTrainedModel:
    """The directory as transformers loads it, with every tensor accounted for."""
    found, report = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not any(report.values()), report
    return found


def same_weights(first: PreTrainedModel, second: PreTrainedModel) -> bool:
    one, two = first.state_dict(), second.state_dict()
    return one.keys() == two.keys() and all(
        torch.equal(one[name], two[name]) and one[name].dtype == two[name].dtype for name in one
    )


def test_names_shapes_and_parameters_are_those_of_the_transformers_class(model: PreTrainedModel):
    family = family_of(model.config.model_type)
    description = describe_spec(family.spec(model.config.to_dict(), exhaustive=True))
    tensors = hf_tensors(family.rules("causal-lm"), description)
    assert {t.name: t.shape for t in tensors} == {n: tuple(v.shape) for n, v in model.state_dict().items()}
    assert {t.name: t.shape for t in tensors if not t.tied} == {
        n: tuple(v.shape) for n, v in model.named_parameters()
    }
    assert description.parameters == model.num_parameters()


def test_a_written_configuration_is_the_one_that_transformers_wrote(model: PreTrainedModel):
    family = family_of(model.config.model_type)
    original = model.config.to_dict()
    written = family.hf_config(family.spec(original))
    again = type(model.config)(
        **{**written, **{k: original[k] for k in ("bos_token_id", "eos_token_id")}}
    ).to_dict()
    ignored = {"_name_or_path", "architectures", "dtype"}
    assert {k: v for k, v in again.items() if k not in ignored} == {
        k: v for k, v in original.items() if k not in ignored
    }


@pytest.mark.parametrize(
    "dtype, shard",
    [(torch.float32, "10GB"), (torch.float32, "8KB"), (torch.bfloat16, "8KB"), (torch.float16, "10GB")],
    ids=["fp32", "fp32-sharded", "bf16-sharded", "fp16"],
)
def test_a_directory_goes_through_mpsdk_unchanged(
    model: PreTrainedModel, dtype: torch.dtype, shard: str, tmp_path: Path
):
    model = model.to(dtype)
    model.save_pretrained(tmp_path / "original", max_shard_size=shard)
    found = read_model(tmp_path / "original")
    export(
        opened(tmp_path / "original"),
        found.spec,
        tmp_path / "exported",
        hf_config=found.hf_config,
        tokenizer_dir=tmp_path / "original",
        dtype=str(dtype).removeprefix("torch."),  # type: ignore[arg-type]
        max_shard_bytes=8000 if shard == "8KB" else 1 << 30,
    )
    assert len(list((tmp_path / "exported").glob("*.safetensors"))) == 1 or shard == "8KB"
    exported = loaded(tmp_path / "exported")
    assert same_weights(exported, model)
    assert exported.config.to_diff_dict() == model.config.to_diff_dict()


def test_initial_weights_arrive_in_transformers_under_their_names(model: PreTrainedModel, tmp_path: Path):
    spec = family_of(model.config.model_type).spec(model.config.to_dict())
    source = RandomSource(describe_spec(spec), seed=5)
    export(source, spec, tmp_path / "m", hf_config=model.config.to_dict())
    found = loaded(tmp_path / "m")
    blocks = found.transformer.h if spec.family == "gpt2" else found.model.layers
    down = blocks[2].mlp.c_proj.weight.T if spec.family == "gpt2" else blocks[2].mlp.down_proj.weight
    expected = source.read("blocks.2.feed_forward.down.weight", "weight", (0, 0), tuple(down.shape))
    np.testing.assert_array_equal(down.detach().numpy(), expected)
    assert torch.isfinite(found(torch.arange(8)[None]).logits).all()


def test_query_key_and_value_are_told_apart(tmp_path: Path):
    """Each canonical tensor does in plain numpy what its layer does in transformers."""
    made = gpt2()
    made.save_pretrained(tmp_path)
    attention = made.transformer.h[1].attn
    hidden = torch.randn(5, 16)
    expected = dict(zip(("query", "key", "value"), attention.c_attn(hidden).split(16, dim=-1), strict=True))
    source = opened(tmp_path)
    for name, values in expected.items():
        weight = source.read(f"blocks.1.attention.{name}.weight", "weight", (0, 0), (16, 16))
        bias = source.read(f"blocks.1.attention.{name}.bias", "weight", (0,), (16,))
        np.testing.assert_allclose(hidden.numpy() @ weight.T + bias, values.detach().numpy(), atol=1e-6)


def test_a_base_model_saved_alone_is_read(tmp_path: Path):
    made = gpt2()
    made.transformer.save_pretrained(tmp_path)
    weight = opened(tmp_path).read("head.output.weight", "weight", (0, 0), (61, 16))
    np.testing.assert_array_equal(weight, made.lm_head.weight.detach().numpy())


@pytest.mark.parametrize(
    "parameters",
    [
        {"rope_type": "default", "rope_theta": 1e4},
        {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0},
        LLAMA3,
    ],
    ids=lambda parameters: parameters["rope_type"],
)
@pytest.mark.parametrize("head_dim", [64, 96])
def test_rotary_frequencies_are_those_of_transformers(parameters: dict[str, object], head_dim: int):
    config = LlamaConfig(
        hidden_size=256, num_attention_heads=4, head_dim=head_dim, rope_parameters=parameters
    )
    expected = LlamaRotaryEmbedding(config).inv_freq.numpy()
    found = inverse_frequencies(family_of("llama").spec(config.to_dict(), exhaustive=True))
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_an_activation_means_in_transformers_what_the_spec_says(name: str):
    x = torch.linspace(-4, 4, 101)
    meaning = {
        "gelu": torch.nn.functional.gelu,
        "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
        "relu": torch.relu,
        "silu": torch.nn.functional.silu,
    }
    torch.testing.assert_close(ACT2FN[name](x), meaning[ACTIVATIONS[name]](x), rtol=0, atol=1e-6)


def test_heads_that_do_not_divide_the_hidden_size_are_refused_as_transformers_refuses_them():
    config = {"hidden_size": 18, "num_attention_heads": 4, "head_dim": 4}
    with pytest.raises(Exception, match="not a multiple of the number of attention"):
        LlamaConfig(**config)
    with pytest.raises(ConfigError, match="must divide hidden_size = 18"):
        family_of("llama").spec(config)
