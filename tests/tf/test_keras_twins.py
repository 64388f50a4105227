"""Tensor parallelism of a user's own Keras model: parallel twins in the place of its layers, against plain Keras."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest

from mpsdk.errors import ConfigError
from mpsdk_tf import set_tensor_parallelism, tensor_parallelism, tp_register, tp_register_with_module
from tests.cases import BOUND, MemorySource, Outcome, assemble
from tests.tf import keras_cut_models, ranks
from tests.tf.test_keras_model import (
    ADAMW,
    PP2,
    SGD,
    assert_as_keras,
    describe,
    evaluate_then_train,
    make_plan,
    reference,
    run,
    train,
)

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tp2": (2, {"tensor_parallel": 2}),
    "tp4": (4, {"tensor_parallel": 4}),
    "sdp2-tp2": (4, {"sharded_data_parallel": 2, "tensor_parallel": 2}),
    "pp2-tp2": (4, {"pipeline": PP2, "tensor_parallel": 2}),
    "pp2-tp2-zb-h1-recomputed": (
        4,
        {"pipeline": PP2 | {"schedule": "zb-h1"}, "tensor_parallel": 2, "activation_checkpointing": "full"},
    ),
}
CASES = [
    (name, layout)
    for name in ("sequential", "einsums", "styled", "mixers", "functional", "tied", "padded")
    for layout in LAYOUTS
]
SHORT = {
    ("sequential", "tp4"), ("sequential", "pp2-tp2-zb-h1-recomputed"), ("einsums", "tp2"), ("styled", "sdp2-tp2"),
    ("mixers", "pp2-tp2"), ("functional", "tp2"), ("tied", "sdp2-tp2"), ("tied", "pp2-tp2"), ("padded", "tp2"),
}  # fmt: skip
INDIVISIBLE = {
    ("einsums", "tp4"),
    ("mixers", "tp4"),
}  # 102 rows of logits and 6 features; nothing, but the same as tp2


def cut(name: str) -> dict[str, int]:
    """The dimension in which each tensor is cut."""
    tensors = describe(name).tensors()
    return {each.name: each.dimension for each in tensors if each.dimension is not None}


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        pytest.param(*case, marks=() if case in SHORT else pytest.mark.long, id="-".join(case))
        for case in CASES
    ],
)
def test_steps_of_sgd_give_the_losses_norms_and_weights_of_plain_keras(name: str, layout: str) -> None:
    world_size, distribution = LAYOUTS[layout]
    assert_as_keras(run(name, world_size, distribution, **SGD), name)


def test_a_checkpoint_of_cut_layers_goes_on_in_stages_and_back() -> None:
    state, losses, norms = None, [], []
    for step, layout in enumerate(({"tensor_parallel": 2}, {"pipeline": PP2}, {"tensor_parallel": 2})):
        before = ranks.run(2, train, make_plan("sequential", 2, layout, **ADAMW), 1, state, step)
        state = MemorySource(assemble([piece for one in before for piece in one.state]), before[0].scalars)
        losses += before[0].losses
        norms += before[0].norms
    expected = reference("sequential", sgd=False)
    np.testing.assert_allclose(losses, expected[0], rtol=BOUND)
    np.testing.assert_allclose(norms, expected[1], rtol=BOUND)


def test_layers_are_cut_by_outputs_or_where_more_ranks_can_share_them_by_inputs() -> None:
    found = cut("sequential")
    assert found["model/embedding/embeddings"] == 1
    assert found["model/block/multi_head_attention/query/kernel"] == 1
    assert found["model/block/multi_head_attention/attention_output/kernel"] == 0
    assert found["model/block/dense/kernel"] == 1
    assert found["model/dense_4/kernel"] == 0, "101 outputs"
    assert "model/dense_4/bias" not in found
    found = cut("einsums")
    assert (found["heads/kernel"], found["heads/bias"]) == (2, 2), "8 in a head, and there are 4 heads"
    assert (found["apart/kernel"], "apart/bias" in found) == (0, False), "6 and 7 outputs, 32 inputs"
    assert (found["logits/kernel"], found["logits/bias"]) == (1, 0), "104 logits, which stay cut"
    assert cut("functional")["reversible_embedding/embeddings"] == 1, "101 rows"
    assert cut("tied")["reversible_embedding/embeddings"] == 0, "104 rows, and logits that stay cut"


def test_only_what_is_marked_is_cut_where_something_is() -> None:
    assert set(cut("mixers")) == {
        "mixer/dense/kernel",
        "mixer/dense/bias",
        "mixer/gain",
        "mixer/dense_1/kernel",
    }
    assert set(cut("styled")) == {
        "styled/embedding/embeddings", "styled/dense/kernel", "styled/dense/bias", "styled/dense_1/kernel",
    }  # fmt: skip


def test_elements_held_are_the_plans_and_a_rank_has_half_of_what_is_cut() -> None:
    plan = make_plan("sequential", 2, {"tensor_parallel": 2})
    outcomes: list[Outcome] = ranks.run(2, train, plan, 1)
    for tp, outcome in enumerate(outcomes):
        held = {name: values for name, _, _, values in outcome.state if name.startswith("weight/")}
        planned = {f"weight/{each.name}": each for each in plan.stage_tensors(0, tp)}
        assert {name: values.shape for name, values in held.items()} == {
            name: each.shape for name, each in planned.items() if each.owned
        }
    whole = {each.name: each.elements for each in plan.description.tensors()}
    for each in plan.stage_tensors(0, 0):
        assert np.prod(each.shape) * (1 if each.tensor.dimension is None else 2) == whole[each.name]


def test_dropout_in_cut_layers_is_a_function_of_when_and_where() -> None:
    plain, again = (
        ranks.run(2, evaluate_then_train, make_plan("dropping", 2, {"tensor_parallel": 2, **mode}))
        for mode in ({}, {"activation_checkpointing": "full"})
    )
    assert plain == again
    assert plain[0] == plain[1]
    evaluated, trained, _ = plain[0]
    assert evaluated == pytest.approx(reference("dropping", sgd=True)[0][0], rel=BOUND)
    assert abs(trained / evaluated - 1) > 1e-4, "nothing was dropped"


# -- what can't be cut -----------------------------------------------------------------------------------------------


def test_degrees_that_do_not_divide_and_what_goes_with_no_cut_layer_are_all_refused() -> None:
    distribution = {
        "tensor_parallel": {"degree": 3, "sequence_parallel": True}, "compile": True,
    }  # fmt: skip
    with pytest.raises(ConfigError) as caught:
        make_plan("sequential", 3, distribution)
    text = str(caught.value)
    for words in (
        "size of dimension 1 of model/embedding/embeddings (32); 1, 2, 4, 8, 16, 32 would do, or leave the layer whole",
        "size of dimension 1 of model/block/multi_head_attention/query/kernel (4)",
        "size of dimension 0 of model/dense_4/kernel (32)",
        "tensor_parallel.sequence_parallel (got True)",
        "compile (got True): XLA has no collectives",
    ):
        assert words in text


def test_a_model_without_a_layer_to_cut_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"no layer of whole has a parallel twin and is to be cut"):
        make_plan("left_whole", 2, {"tensor_parallel": 2})


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("with_unknown_style", "style is 'sideways'; it must be one of colwise_gather_output, colwise"),
        ("with_softmax_of_a_part", "gives a rank its own features, and softmax looks at all of them"),
        ("with_unknown_setting", "PlannedEmbedding can't be made"),
        ("with_misfits", r"misfits/gain .*is not in the twin"),
        ("with_misfits", r"misfits/other .*is in the twin alone"),
        ("with_misfits", r"misfits/kernel .*the layer's is \(32, 32\)"),
        ("with_misfits", r"misfits.cuts\['nothing'\] .*has no such dimension"),
        ("borrowing", r"has a weight that another layer uses too"),
        ("without_cuts", r"unsaid.cuts \(got 'None'\): WithoutCuts must say which dimension"),
    ],
)
def test_twins_that_cannot_stand_in_are_refused_with_the_layer_and_the_reason(name: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make_plan(name, 2, {"tensor_parallel": 2})
    make_plan(name, 2, {"sharded_data_parallel": 2})


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("half_a_pair", r"calling the model on ids of shape \(2, 16\) failed"),
        ("wrongly_cut", r"up/kernel .*for 2 ranks WrongCuts must have \(16, 48\), as its cuts say"),
        ("peeking", r"embedding/embeddings \(got 'cut'\): is read by another layer than the one that has it"),
    ],
)
def test_what_does_not_fit_on_the_ranks_is_refused_before_anything_is_computed(name: str, words: str) -> None:
    with pytest.raises(ranks.CaseError, match=words):
        run(name, 2, {"tensor_parallel": 2}, **SGD)


def test_bf16_computes_in_bf16_in_cut_layers_too() -> None:
    for name in ("sequential", "mixers"):
        outcomes = run(name, 2, {"tensor_parallel": 2, "precision": "bf16"}, **SGD)
        losses = reference(name, sgd=True)[0]
        assert outcomes[0].losses == outcomes[1].losses
        np.testing.assert_allclose(outcomes[0].losses, losses, rtol=1e-2)
        assert np.abs(np.array(outcomes[0].losses) / losses - 1).max() > 1e-6


def test_what_is_said_of_a_layer_holds_for_what_it_makes_later() -> None:
    assert set(cut("told_before_it_is_built")) == {"embedding/embeddings", "dense/kernel"}


def test_a_hook_of_another_signature_and_a_second_twin_are_refused_together() -> None:
    with pytest.raises(ConfigError) as caught:
        tp_register_with_module(
            keras_cut_models.Mixer,
            keras_cut_models.ParallelMixer,
            forward_hook=lambda hidden: ((hidden,), {}),
        )
    assert [problem.field for problem in caught.value.problems] == ["forward_hook", "module_cls"]
    assert "must take (hidden, scale=1.0), as Mixer.call does" in str(caught.value)
    with pytest.raises(ConfigError, match="has a twin already, PlannedEinsum"):
        tp_register(keras_cut_models.ParallelMixer)(keras.layers.Dense)


def test_marks_hold_for_what_is_made_within_and_the_innermost_counts() -> None:
    from mpsdk_tf.register import mark_of

    with tensor_parallelism(style="colwise"):
        outer = keras.layers.Dense(4)
        with tensor_parallelism(False):
            inner = keras.layers.Dense(4)
    after = keras.layers.Dense(4)
    assert mark_of(outer) == (True, {"style": "colwise"})
    assert mark_of(inner) == (False, {})
    assert mark_of(after) is None
    model = keras.Sequential([keras.Input((4,)), outer, keras.Sequential([after])])
    set_tensor_parallelism(model, False)
    assert mark_of(outer) == mark_of(after) == (False, {})
