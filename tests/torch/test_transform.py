"""`transform` and delayed initialisation: rank 0 has the weights, and every rank gets what it is to hold."""

from __future__ import annotations

import pytest
import torch
import transformers

from mpsdk.errors import CheckpointError, ConfigError
from mpsdk.families import FAMILIES
from mpsdk_torch import transform
from mpsdk_torch.delayed_param import delay_param_initialization
from tests.torch.pool import WorkerPool
from tests.torch.spreading import CONFIGS, HEADS, make_ids, make_model, spread

BOUND = 1e-5
WITH_HEAD = [
    (name, head)
    for name in CONFIGS
    for head in HEADS
    if any(head in known.architecture or (head == "CausalLM" and "LMHead" in known.architecture)
           for known in FAMILIES[name.removesuffix("-tied")].heads)
]  # fmt: skip


@pytest.mark.parametrize("name, head", WITH_HEAD)
def test_a_transformed_model_gives_transformers_logits(name: str, head: str) -> None:
    original = make_model(name, head)
    model = transform(original)
    assert not model.training
    ids = make_ids()
    ids[1, 6:] = original.config.pad_token_id
    mask = (ids != original.config.pad_token_id).long()
    with torch.no_grad():
        expected = original(ids, attention_mask=mask).logits
        found = model(ids, attention_mask=mask)
    if head != "SequenceClassification":
        found, expected = found[mask.bool()], expected[mask.bool()]
    assert (found - expected).abs().max() <= BOUND * expected.abs().max()


def test_tensors_that_need_no_rearranging_are_shared_with_the_original() -> None:
    original = make_model("llama")
    model = transform(original)
    kept = {parameter.data_ptr() for parameter in original.parameters()}
    assert all(parameter.data_ptr() in kept for parameter in model.parameters())


def test_frozen_weights_dtype_and_mode_are_kept() -> None:
    original = make_model("qwen2").to(torch.bfloat16).train()
    original.model.embed_tokens.requires_grad_(False)
    model = transform(original)
    assert model.training
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == [
        "embedding.tokens.weight"
    ]


@pytest.mark.parametrize("name", CONFIGS)
def test_each_tensor_parallel_rank_gets_its_part(pool: WorkerPool, name: str) -> None:
    for rank, seen in enumerate(pool.run(2, spread, name, {"tensor_parallel": 2}, "")):
        assert not seen.wrong
        assert seen.distance <= BOUND
        assert not seen.wrong_gradients
        assert rank == 0 or seen.peak < 0.75 * seen.elements


SHARDED = {
    "sdp2": (2, {"sharded_data_parallel": 2}),
    "sdp4": (4, {"sharded_data_parallel": 4}),
    "sdp2-tp2": (4, {"sharded_data_parallel": 2, "tensor_parallel": 2}),
}
QUICK = {("llama", "sdp2"), ("llama-tied", "sdp4"), ("gpt2", "sdp2-tp2")}


@pytest.mark.parametrize("how", ["fsdp1", "fsdp2"])
@pytest.mark.parametrize(
    "name, layout",
    [
        pytest.param(name, layout, marks=[] if (name, layout) in QUICK else [pytest.mark.long])
        for name in ("gpt2", "llama", "llama-tied", "bert")
        for layout in SHARDED
    ],
)
def test_sharding_spreads_rank_0s_weights_and_no_other_rank_holds_the_whole(
    pool: WorkerPool, name: str, layout: str, how: str
) -> None:
    world_size, config = SHARDED[layout]
    for rank, seen in enumerate(pool.run(world_size, spread, name, config, how)):
        assert not seen.wrong
        assert seen.distance <= BOUND
        assert rank == 0 or seen.peak < seen.elements


def test_a_model_of_no_family_is_refused_with_what_to_do() -> None:
    with pytest.raises(ConfigError, match=r"mpsdk_torch\.parallelize_model"):
        transform(torch.nn.Linear(2, 2))
    config = transformers.OPTConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
                                    ffn_dim=8, word_embed_proj_dim=8, max_position_embeddings=8)  # fmt: skip
    with pytest.raises(ConfigError, match="OPTForCausalLM of model_type 'opt'"):
        transform(transformers.OPTForCausalLM(config))


def test_a_head_that_is_not_known_is_refused_with_those_that_are() -> None:
    with pytest.raises(ConfigError, match=r"LlamaModel.*give one of LlamaForCausalLM"):
        transform(make_model("llama").model)


def test_tensors_that_do_not_fit_are_listed_in_one_error() -> None:
    original = make_model("llama")
    original.model.norm.weight = torch.nn.Parameter(torch.ones(3))
    original.model.extra = torch.nn.Linear(2, 2)
    with pytest.raises(CheckpointError) as caught:
        transform(original)
    assert "wrong shape: model.norm.weight" in str(caught.value)
    assert "unexpected: model.extra.weight" in str(caught.value)
    assert "unexpected: model.extra.bias" in str(caught.value)


def test_rank_0_must_have_weights() -> None:
    with delay_param_initialization():
        original = make_model("llama")
    with pytest.raises(ConfigError, match="must not be on the meta device"):
        transform(original)
    model = transform(original, load_state_dict_from_rank0=False)
    assert all(parameter.is_meta for parameter in model.parameters())


def test_a_pipeline_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"pipeline\.degree"):
        transform(make_model("llama"), {"pipeline": 2})
