"""Models that mpsdk has no family for: cut by the plan that they bring, by one's own, by twins; sharded by their blocks."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mpsdk.errors import BackendError, ConfigError
from mpsdk_torch import (
    layout,
    parallelize_model,
    register,
    set_tensor_parallelism,
    tensor_parallelism,
    tp_register,
)
from mpsdk_torch.any_model import _work, find_blocks, shard_model
from mpsdk_torch.comm import TensorGroup
from mpsdk_torch.stages import pipeline_stage
from tests.cases import BOUND
from tests.torch.pool import WorkerPool
from tests.torch.splitting import (
    ARCHITECTURES,
    Compared,
    Mixer,
    Model,
    compare,
    compare_any_sharded,
    compare_sharded,
    compare_stages,
    compare_twins,
    make_model,
)

QUICK = ("cohere", "exaone4", "gemma2", "granite", "olmo2", "phi3", "starcoder2")


@pytest.mark.parametrize(
    "architecture",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.long) for name in ARCHITECTURES],
)
def test_a_model_of_transformers_is_cut_by_its_own_plan(pool: WorkerPool, architecture: str) -> None:
    for seen in pool.run(2, compare, architecture, {}):
        assert_the_same(seen)


def assert_the_same(seen: Compared, share: float = 0.65) -> None:
    assert seen.loss == pytest.approx(seen.expected_loss, rel=BOUND)
    assert not seen.wrong
    assert seen.share < share


@pytest.mark.parametrize("architecture", ["gemma2", "granite"])
def test_tied_and_untied_embeddings_are_cut(pool: WorkerPool, architecture: str) -> None:
    for tied in (True, False):
        for seen in pool.run(2, compare, architecture, {"tie_word_embeddings": tied}):
            assert_the_same(seen)
            assert seen.tied is tied


def test_ones_own_plan_stands_over_the_models(pool: WorkerPool) -> None:
    plan = {"model.layers.*.mlp.*": None, "lm_head": None, "model.embed_tokens": None}
    for seen in pool.run(2, compare, "granite", {}, plan):
        assert_the_same(seen, share=0.9)
        assert seen.share > 0.65


def test_a_mixture_of_experts_is_refused_and_cut_around_its_experts(pool: WorkerPool) -> None:
    model = make_model("mixtral")
    found = problems(model, 2)
    assert "is for a parameter, and mpsdk cuts modules" in found["model.layers.*.mlp.experts.down_proj"]
    assert "mpsdk has no such style" in found["model.layers.*.mlp.experts"]
    assert (
        "leave it whole with plan={'model.layers.*.mlp.experts': None}" in found["model.layers.*.mlp.experts"]
    )
    for seen in pool.run(2, compare, "mixtral", {}, {"model.layers.*.mlp.*": None}):
        assert_the_same(seen, share=0.95)


def test_parameters_that_a_plan_leaves_out_beside_what_it_cuts_are_asked_for(pool: WorkerPool) -> None:
    found = problems(make_model("apertus"), 2)
    assert list(found) == ["model.layers.*.mlp.act_fn"]
    assert "has parameters beside up_proj, whose features are cut, and the plan leaves it out" in str(found)
    plan = {"model.layers.*.mlp.act_fn": "replicated_with_grad_allreduce"}
    # In float64: the gradient of a scalar is a sum over all features, in which most of them cancel.
    for seen in pool.run(2, compare, "apertus", {}, plan, torch.float64):
        assert_the_same(seen)


@pytest.mark.parametrize("how", ["fsdp1", "fsdp2"])
@pytest.mark.parametrize("architecture", ["gemma2", pytest.param("exaone4", marks=pytest.mark.long)])
def test_rank_0s_weights_are_cut_and_sharded(pool: WorkerPool, architecture: str, how: str) -> None:
    for rank, seen in enumerate(pool.run(4, compare_sharded, architecture, how)):
        assert_the_same(seen)
        assert rank == 0 or seen.peak < 1


# -- models of one's own ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("marking", ["layers", "plan", "twins"])
def test_a_model_of_ones_own_is_cut(pool: WorkerPool, marking: str) -> None:
    for seen in pool.run(2, compare_twins, marking):
        assert_the_same(seen, share=0.9 if marking == "plan" else 0.75)
        assert seen.tied


def test_any_module_is_sharded_by_the_blocks_that_are_found(pool: WorkerPool) -> None:
    for seen in pool.run(2, compare_any_sharded):
        assert_the_same(seen, share=0.6)
        assert seen.tied


def test_blocks_are_the_largest_list_of_one_class() -> None:
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.short = nn.ModuleList(nn.Linear(2, 2) for _ in range(4))
            self.body = nn.ModuleDict({"layers": nn.ModuleList(nn.Linear(9, 9) for _ in range(3))})
            self.mixed = nn.Sequential(nn.Linear(50, 50), nn.ReLU())

    assert [name for name, _ in find_blocks(Nested())] == ["body.layers.0", "body.layers.1", "body.layers.2"]
    assert find_blocks(nn.Linear(2, 2)) == []


def test_what_units_cannot_share_is_listed() -> None:
    model = Model()
    model.mixers[1].up.weight = model.mixers[0].up.weight
    model.scale = nn.Parameter(torch.ones(()))
    with pytest.raises(ConfigError) as caught:
        shard_model(model, None)  # type: ignore[arg-type]
    assert [problem.field for problem in caught.value.problems] == [
        "scale",
        "mixers.0.up.weight and mixers.1.up.weight",
    ]


def test_a_layout_ends_with_the_ranks_that_it_was_made_for() -> None:
    layout.lay_out({})
    assert layout.current() is not None
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        assert layout.current() is None
        made = layout.lay_out({"tensor_parallel": 1})
        assert layout.current() is made
        assert made.mesh is not None and made.mesh.mesh_dim_names == ("dp", "sdp", "tp")
        with pytest.raises(
            ConfigError, match=r"tensor_parallel\.degree 2 x sharded_data_parallel\.degree 1 must divide it"
        ):
            layout.lay_out({"tensor_parallel": 2})
    finally:
        torch.distributed.destroy_process_group()
    assert layout.current() is None


# -- twins -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def twins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(register, "_twins", {})


def problems(model: nn.Module, size: int, plan: dict[str, str | None] | None = None) -> dict[str, str]:
    """What stands against cutting `model` over so many ranks, by field."""
    with pytest.raises(ConfigError) as caught:
        _work(model, TensorGroup(None, 0, size), plan or {})
    return {problem.field: problem.remedy for problem in caught.value.problems}


def test_a_hook_must_take_what_it_translates(twins: None) -> None:
    class Own(Mixer):
        pass

    with pytest.raises(ConfigError) as caught:
        tp_register(nn.Linear, init_hook=lambda width: None, forward_hook=lambda hidden, scale=2.0: None)(Own)
    assert [(problem.field, problem.remedy) for problem in caught.value.problems] == [
        ("init_hook", "must take (width, inner=8, *, bias=True), as Mixer.__init__ does"),
        ("forward_hook", "must take (hidden, scale=1.0), as Mixer.forward does"),
    ]
    tp_register(nn.Linear, init_hook=lambda *args, **kwargs: (args, kwargs))(Own)
    with pytest.raises(ConfigError, match="has a twin already, Linear; register a class once"):
        tp_register(nn.Linear)(Own)


def test_an_init_hook_may_leave_a_module_whole_and_settings_override_it(twins: None) -> None:
    @tp_register(Mixer, init_hook=lambda width, wide=False: ((width,), {"inner": 4}) if wide else None)
    class Own(nn.Module):
        def __init__(self, width: int, wide: bool = False) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(width, 6), nn.Linear(6, width, bias=False)

        def forward(self, hidden: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
            return hidden

    with tensor_parallelism(inner=6):
        model = nn.ModuleList([Own(4), Own(4, wide=True)])
    cut = [(name, twin) for name, _, twin in register.marked(model)]
    assert [name for name, twin in cut if twin is not None] == ["1"]
    made = register.make_twin("1", model[1], register._twins[Own], TensorGroup())
    assert torch.equal(made.up.weight, model[1].up.weight)


def test_a_module_made_before_its_class_got_a_twin_is_refused(twins: None) -> None:
    class Own(nn.Linear):
        pass

    model = nn.Sequential(Own(4, 4))
    set_tensor_parallelism(model)
    tp_register(nn.Linear)(Own)
    assert problems(model, 2) == {"0": "was made before Own got its twin; call tp_register_with_module first"}


def test_weights_that_a_twin_cannot_take_over_are_listed(twins: None) -> None:
    class Own(nn.Linear):
        pass

    tp_register(Mixer, init_hook=lambda *args, **kwargs: ((4,), {}))(Own)
    with tensor_parallelism():
        model = nn.Sequential(Own(4, 4))
    with pytest.raises(ConfigError) as caught:
        register.make_twin("0", model[0], register._twins[Own], TensorGroup())
    fields = [problem.field for problem in caught.value.problems]
    assert fields == ["0.up.weight", "0.up.bias", "0.down.weight", "0.weight", "0.bias"]
    assert "give Mixer a method load_whole(original)" in str(caught.value)


def test_a_twin_may_load_its_weights_itself(twins: None) -> None:
    class Doubled(nn.Linear):
        def load_whole(self, original: nn.Linear) -> None:
            with torch.no_grad():
                self.weight.copy_(2 * original.weight)

    class Own(nn.Linear):
        pass

    tp_register(Doubled)(Own)
    with tensor_parallelism():
        model = nn.Sequential(Own(4, 4))
    made = register.make_twin("0", model[0], register._twins[Own], TensorGroup())
    assert torch.equal(made.weight, 2 * model[0].weight)


# -- what can't be cut -----------------------------------------------------------------------------------------------


def test_everything_that_cannot_be_cut_is_listed_with_what_to_do() -> None:
    found = problems(make_model("cohere"), 3)
    assert found["model.layers.*.self_attn.q_proj"] == (
        "its 4 heads can't be shared by 3 ranks; a tensor_parallel.degree of 1, 2, 4 would do"
    )
    assert found["model.layers.*.self_attn.o_proj"] == (
        "16 columns of its weight can't be shared by 3 ranks; a tensor_parallel.degree of 1, 2, 4, 8, 16 would do, or leave it "
        "whole with plan={'model.layers.*.self_attn.o_proj': None}"
    )
    assert "resize_token_embeddings(pad_to_multiple_of=3)" in found["lm_head"]
    assert "resize_token_embeddings(pad_to_multiple_of=3)" in found["model.embed_tokens"]
    heads = problems(make_model("cohere"), 4)
    assert heads["model.layers.*.self_attn.k_proj"] == (
        "its 2 heads can't be shared by 4 ranks; a tensor_parallel.degree of 1, 2 would do"
    )
    assert not any("q_proj" in field or "o_proj" in field for field in heads)


def test_a_plan_is_checked_against_the_model() -> None:
    plan = {"stem.0": "rowwise", "stem.1": "colwise", "side": "diagonal", "nothing": None, "output": None,
            "tokens": "embedding_rowwise"}  # fmt: skip
    found = problems(Model(), 2, plan)
    assert "matches no module" in found["plan['nothing']"]
    assert "is for nn.Linear, and this is LayerNorm" in found["stem.1"]
    assert "mpsdk has no such style" in found["side"]
    assert "cut both alike or neither" in found["tokens and output"]
    assert "stem.0" not in found


def test_what_ones_own_plan_leaves_whole_stays_whole() -> None:
    plan = {"model.embed_tokens": None, "model.layers.*.mlp.up_proj.weight": "colwise"}
    found = problems(make_model("cohere"), 2, plan)
    assert "cut both alike or neither" in found["model.embed_tokens and lm_head"]
    assert "matches no module" in found["plan['model.layers.*.mlp.up_proj.weight']"]


def test_a_model_without_a_plan_is_told_its_ways() -> None:
    remedy = problems(Model(), 2)["model"]
    for way in ("plan={'mixers.*.up': 'colwise'", "tp_register_with_module", "mpsdk_torch.shard_model"):
        assert way in remedy


def test_layers_whose_weights_others_read_are_refused() -> None:
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(4, 2)})
    set_tensor_parallelism(model)
    assert "NonDynamicallyQuantizableLinear" in problems(model, 2)["attention.out_proj"]


def test_several_ranks_must_have_joined() -> None:
    with pytest.raises(BackendError, match="init_process_group first"):
        parallelize_model(Model(), {"tensor_parallel": 2})


# -- pipeline stages -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.long)])
@pytest.mark.parametrize(
    "architecture",
    [
        "gemma2",
        "olmo2",
        pytest.param("cohere", marks=pytest.mark.long),
        pytest.param("starcoder2", marks=pytest.mark.long),
    ],
)
def test_a_model_is_split_into_stages_by_its_own_plan(
    pool: WorkerPool, architecture: str, ranks: int
) -> None:
    for seen in pool.run(ranks, compare_stages, architecture):
        assert_the_same(seen, share=0.75)


def test_a_model_that_changes_hidden_states_between_its_parts_has_no_stages() -> None:
    model = make_model("granite")
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(
        ConfigError, match="changes hidden states between its parts, which every stage would do again"
    ):
        pipeline_stage(model, 0, 2)
    assert [name for name, _ in model.named_modules()] == names


def test_a_sequential_is_split_between_its_members() -> None:
    torch.manual_seed(0)
    whole = nn.Sequential(*(nn.Linear(3, 3) for _ in range(4)))
    x, expected = torch.ones(2, 3), whole(torch.ones(2, 3))
    parts = []
    for start in (0, 2):
        part = nn.Sequential(*(nn.Linear(3, 3) for _ in range(4)))
        part.load_state_dict(whole.state_dict())
        parts.append(pipeline_stage(part, start, start + 2))
    assert torch.equal(parts[1](parts[0](x)), expected)
    assert {name for name, _ in parts[1].named_parameters()} == {"2.weight", "2.bias", "3.weight", "3.bias"}


def test_a_model_without_stages_is_told_its_ways() -> None:
    with pytest.raises(
        ConfigError, match="brings no pipeline plan; use tensor_parallel or sharded_data_parallel"
    ):
        pipeline_stage(Model(), 0, 1)
    with pytest.raises(ConfigError, match="which has 4, numbered from 0"):
        pipeline_stage(make_model("olmo2"), 2, 5)
