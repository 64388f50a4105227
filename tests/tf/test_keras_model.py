"""A user's own Keras model, against the same model trained by plain Keras and TensorFlow code in one process."""

from __future__ import annotations

import functools
import gc
import weakref
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from numpy.typing import NDArray

from mpsdk.backend import Place, TensorSource
from mpsdk.config import Distribution, Precision, Training
from mpsdk.errors import ConfigError
from mpsdk.factory import Factory
from mpsdk.plan import Plan
from mpsdk.resolve import resolve
from mpsdk_tf.backend import TensorFlowBackend
from mpsdk_tf.keras_model import FirstValues, make
from tests.cases import (
    BOUND,
    GLOBAL_BATCH,
    MemorySource,
    Outcome,
    assemble,
    assert_close,
    global_batch,
    rows_of,
)
from tests.tf import keras_cut_models, keras_models, ranks

SEED, STEPS = 3, 3
TRAINING: dict[str, Any] = {
    "steps": 10, "global_batch": GLOBAL_BATCH, "sequence_length": keras_models.LENGTH, "accumulation": 2, "seed": SEED,
    "max_grad_norm": 0.5, "weight_decay": 0.1,
}  # fmt: skip
ADAMW: dict[str, Any] = {"learning_rate": 1e-3}
SGD: dict[str, Any] = {"optimizer": "sgd", "momentum": 0.9, "learning_rate": 0.05}
PP2 = {"degree": 2, "microbatches": 4}


def home(name: str) -> ModuleType:
    """The module with the factory of that name."""
    return keras_models if hasattr(keras_models, name) else keras_cut_models


@functools.cache
def describe(name: str) -> Any:
    factory = Factory(f"{home(name).__name__}:{name}", "", keras_models.LENGTH)
    return TensorFlowBackend().describe(factory)


def make_plan(name: str, world_size: int, distribution: dict[str, Any], **training: Any) -> Plan:
    return resolve(
        Distribution.parse(distribution),
        describe(name),
        Training(**TRAINING | training),
        world_size=world_size,
        framework="tensorflow",
    )


def train(
    place: Place, plan: Plan, steps: int, source: TensorSource | None = None, start: int = 0
) -> Outcome:
    """From the factory's own weights, or from `source`."""
    backend, outcome = TensorFlowBackend(threads=True), Outcome([], [])
    try:
        backend.build(plan, place)
        if source is not None:
            backend.load(source)
        for step in range(start, start + steps):
            batch = rows_of(global_batch(step, keras_models.VOCABULARY), plan, place.rank)
            rate = plan.training.learning_rate_at(step)
            values = backend.step(batch, step=step, learning_rate=rate).read()
            outcome.losses.append(values["loss"])
            outcome.norms.append(values["grad_norm"])
        state = backend.shards()
        for shard in state.shards:
            piece = (f"{shard.slot}/{shard.name}", shard.global_shape, shard.offset, shard.read())
            outcome.state.append(piece)
        outcome.scalars.update(state.scalars)
        return outcome
    finally:
        backend.close()


def run(name: str, world_size: int, distribution: dict[str, Any], **training: Any) -> list[Outcome]:
    return ranks.run(world_size, train, make_plan(name, world_size, distribution, **training), STEPS)


@functools.cache
def reference(name: str, sgd: bool) -> tuple[list[float], list[float], dict[str, NDArray[Any]], float]:
    """Losses, norms, final weights by path, and the largest element of the first gradient, by a loop of Keras' own kind."""
    training = Training(**TRAINING | (SGD if sgd else ADAMW))
    keras.utils.set_random_seed(SEED)
    with ThreadPoolExecutor(1) as thread:  # Keras counts the names that it gives by thread
        model = thread.submit(getattr(home(name), name)).result()
    variables, losses, norms = model.trainable_variables, [], []
    moments = [[np.zeros(v.shape, np.float64), np.zeros(v.shape, np.float64)] for v in variables]
    largest = 0.0

    @tf.function
    def differentiate(ids: Any, labels: Any) -> Any:
        with tf.GradientTape() as tape:
            each = keras.losses.sparse_categorical_crossentropy(
                tf.maximum(labels, 0), model(ids, training=False), from_logits=True
            )
            used = tf.cast(labels != -100, tf.float32)
            loss = tf.reduce_sum(each * used) / tf.reduce_sum(used)
        return loss, tape.gradient(loss, [v.value for v in variables])

    for step in range(STEPS):
        batch = global_batch(step, keras_models.VOCABULARY)
        loss, gradients = differentiate(batch["input_ids"], batch["labels"])
        gradients = [np.float64(tf.convert_to_tensor(gradient)) for gradient in gradients]
        norm = np.sqrt(sum((gradient**2).sum() for gradient in gradients))
        largest = largest or max(np.abs(gradient).max() for gradient in gradients)
        losses.append(float(loss))
        norms.append(float(norm))
        rate, clip = training.learning_rate_at(step), min(1.0, 0.5 / norm)
        for variable, gradient, moment in zip(variables, gradients, moments, strict=True):
            decays = variable.path.endswith(("kernel", "embeddings"))
            value, decay = np.float64(variable.numpy()), 0.1 if decays else 0.0
            if sgd:
                moment[0] = 0.9 * moment[0] + gradient * clip + decay * value
                variable.assign(value - rate * moment[0])
                continue
            moment[0] = 0.9 * moment[0] + 0.1 * gradient * clip
            moment[1] = 0.999 * moment[1] + 0.001 * (gradient * clip) ** 2
            first, second = moment[0] / (1 - 0.9 ** (step + 1)), moment[1] / (1 - 0.999 ** (step + 1))
            variable.assign(value * (1 - rate * decay) - rate * first / (np.sqrt(second) + 1e-8))
    weights = {weight.path: weight.numpy().reshape(weight.shape or (1,)) for weight in model.weights}
    return losses, norms, weights, largest


def assert_as_keras(outcomes: list[Outcome], name: str) -> None:
    """After steps of SGD. AdamW makes steps of the noise where a gradient is zero by symmetry."""
    losses, norms, weights, largest = reference(name, sgd=True)
    for outcome in outcomes:
        np.testing.assert_allclose(outcome.losses, losses, rtol=BOUND)
        np.testing.assert_allclose(outcome.norms, norms, rtol=BOUND)
    state = assemble([piece for outcome in outcomes for piece in outcome.state])
    found = {key.removeprefix("weight/"): value for key, value in state.items() if key.startswith("weight/")}
    noise = [
        name for name in weights if name.endswith("key/bias")
    ]  # begin at zero, and have no gradient by symmetry
    for name in noise:
        assert max(np.abs(found.pop(name)).max(), np.abs(weights[name]).max()) <= 1e-7 * largest
    assert_close(
        found, {name: value for name, value in weights.items() if name not in noise}, floor=1e-9 * largest
    )


# -- describe --------------------------------------------------------------------------------------------------------


def test_a_sequential_model_is_cut_at_its_layers_and_named_as_keras_does() -> None:
    described = describe("sequential")
    assert described.factory == "tests.tf.keras_models:sequential"
    assert (described.naming, described.vocab_size, described.spec) == (
        "module",
        keras_models.VOCABULARY,
        None,
    )
    assert [tensor.name for tensor in described.embedding] == ["model/embedding/embeddings"]
    assert [len(described.kinds[kind]) for kind in described.blocks] == [11, 6]
    assert [tensor.name for tensor in described.head] == [
        "model/layer_normalization_2/gamma", "model/layer_normalization_2/beta",
        "model/dense_4/kernel", "model/dense_4/bias",
    ]  # fmt: skip
    shapes = {tensor.name: tensor.shape for tensor in described.tensors()}
    assert shapes["model/block/gain"] == (1,)
    assert shapes["model/block/multi_head_attention/query/kernel"] == (32, 4, 8)
    decays = {tensor.name for tensor in described.tensors() if tensor.decay}
    assert all(name.endswith(("kernel", "embeddings")) for name in decays)


def test_a_functional_model_is_cut_where_one_tensor_alone_leads_on() -> None:
    described = describe("functional")
    assert [len(described.kinds[kind]) for kind in described.blocks] == [10, 2, 2]
    tied = {tensor.name: tensor.tied_to for tensor in described.tensors() if tensor.tied_to}
    assert tied == {"head/reversible_embedding/embeddings": "reversible_embedding/embeddings"}


@pytest.mark.parametrize("name", ["subclassed", "masked"])
def test_what_cannot_be_cut_is_one_block_and_refused_by_a_pipeline_alone(name: str) -> None:
    """A subclassed model; a mask that passes all layers."""
    assert len(describe(name).blocks) == 1
    with pytest.raises(ConfigError, match=r"pipeline.degree \(got 2\): \w+ can't be cut into stages"):
        make_plan(name, 2, {"pipeline": PP2})
    make_plan(name, 2, {"sharded_data_parallel": 2})


def test_calls_that_share_a_layer_are_one_block() -> None:
    described = describe("shared")
    names = [[tensor.name for tensor in described.kinds[kind]] for kind in described.blocks]
    assert names == [
        ["dense/kernel", "dense/bias", "dense_1/kernel", "dense_1/bias"],
        ["dense_2/kernel", "dense_2/bias"],
    ]


def test_frozen_weights_are_known_to_be() -> None:
    frozen = {tensor.name for tensor in describe("frozen").tensors() if not tensor.trainable}
    assert {name.rpartition("/")[0].rpartition("/")[2] for name in frozen} >= {"batch_normalization"}
    assert "model/batch_normalization/moving_mean" in frozen


REFUSED = {
    "with_batch_norm": r"batch_norm; use LayerNormalization .* or freeze",
    "with_regularizer": r"have a regularizer.*dense/kernel",
    "with_activity_regularizer": r"activity_regularizer",
    "with_loss_of_its_own": r"add losses of their own",
    "with_softmax": r"must give logits: leave the softmax out",
    "compiled": r"leave compile\(\) out",
    "unbuilt": r"not built; begin with keras.Input",
    "pooled": r"shape \(2, 101\) .* must give logits of shape \(2, 16, vocabulary\)",
    "nothing": r"gave a dict; it must give a Keras model",
    "failing": r"ArithmeticError: the factory's own message",
    "not_a_callable": r"is a int; name a callable",
    "missing": r"has no attribute 'missing'",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_training_would_leave_out_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=REFUSED[name]):
        describe(name)


def test_a_model_is_not_given_more_positions_than_it_says() -> None:
    with pytest.raises(ConfigError, match="positions for at most 8"):
        make_plan("too_short", 1, {})


def test_selective_recompute_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"activation_checkpointing.mode \(got 'selective'\): keeps results"
    ):
        make_plan("sequential", 2, {"activation_checkpointing": "selective"})


# -- training --------------------------------------------------------------------------------------------------------

ZB_H1 = {"pipeline": PP2 | {"schedule": "zb-h1"}}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "single": (1, {}),
    "dp2": (2, {}),
    "sdp2-parameters": (2, {"sharded_data_parallel": 2}),
    "sdp2-gradients": (2, {"sharded_data_parallel": {"degree": 2, "level": "gradients"}}),
    "sdp2-optimizer": (2, {"sharded_data_parallel": {"degree": 2, "level": "optimizer"}}),
    "pp2": (2, {"pipeline": PP2}),
    "pp2-zb-h1": (2, ZB_H1),
    "pp2-sdp2": (4, {"pipeline": PP2, "sharded_data_parallel": 2}),
    "sdp2-optimizer-recomputed": (
        2,
        {"sharded_data_parallel": {"degree": 2, "level": "optimizer"}, "activation_checkpointing": "full"},
    ),
    "pp2-zb-h1-recomputed-compiled": (2, ZB_H1 | {"activation_checkpointing": "full", "compile": True}),
    "single-compiled": (1, {"compile": True}),
}
CASES = [
    *(("sequential", layout) for layout in LAYOUTS),
    *(("functional", layout) for layout in ("sdp2-parameters", "pp2", "pp2-zb-h1")),
    ("subclassed", "sdp2-parameters"), ("frozen", "pp2"), ("masked", "dp2"),
]  # fmt: skip
SHORT = {  # every layout with some model, every model in some layout
    ("sequential", "sdp2-parameters"), ("sequential", "sdp2-optimizer-recomputed"), ("sequential", "pp2"),
    ("sequential", "pp2-zb-h1-recomputed-compiled"), ("functional", "sdp2-parameters"), ("functional", "pp2-zb-h1"),
    ("subclassed", "sdp2-parameters"), ("frozen", "pp2"), ("masked", "dp2"),
}  # fmt: skip


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


def test_adamw_gives_what_plain_keras_does_and_its_checkpoint_of_shards_goes_on_as_stages() -> None:
    before = ranks.run(2, train, make_plan("sequential", 2, LAYOUTS["sdp2-gradients"][1], **ADAMW), 2)
    state = MemorySource(assemble([piece for one in before for piece in one.state]), before[0].scalars)
    after = ranks.run(2, train, make_plan("sequential", 2, LAYOUTS["pp2"][1], **ADAMW), 1, state, 2)
    losses, norms, _, _ = reference("sequential", sgd=False)
    for first, last in zip(before, after, strict=True):
        np.testing.assert_allclose(first.losses + last.losses, losses, rtol=BOUND)
        np.testing.assert_allclose(first.norms + last.norms, norms, rtol=BOUND)


def evaluate_then_train(place: Place, plan: Plan) -> tuple[float, float, float]:
    """Of the first batch: the loss evaluated, the loss that a step saw, and the gradient's norm."""
    backend = TensorFlowBackend(threads=True)
    try:
        backend.build(plan, place)
        batch = rows_of(global_batch(0, keras_models.VOCABULARY), plan, place.rank)
        found = backend.evaluate(batch, step=0)
        values = backend.step(batch, step=0, learning_rate=1e-3).read()
        return found.loss / found.count, values["loss"], values["grad_norm"]
    finally:
        backend.close()


def test_dropout_is_a_function_of_when_and_where_so_that_recompute_repeats_it() -> None:
    plain, again = (
        ranks.run(1, evaluate_then_train, make_plan("dropping", 1, {"activation_checkpointing": mode}))[0]
        for mode in ("none", "full")
    )
    assert plain == again
    evaluated, trained, _ = plain
    assert evaluated == pytest.approx(reference("dropping", sgd=True)[0][0], rel=BOUND)
    assert abs(trained / evaluated - 1) > 1e-4, "nothing was dropped"


def test_bf16_computes_in_bf16_over_fp32_weights() -> None:
    (outcome,) = run("sequential", 1, {"precision": "bf16"}, **SGD)
    losses = reference("sequential", sgd=True)[0]
    np.testing.assert_allclose(outcome.losses, losses, rtol=1e-2)
    assert np.abs(np.array(outcome.losses) / losses - 1).max() > 1e-6


def test_ranks_whose_factory_gives_other_weights_find_out() -> None:
    plan = make_plan("different_each_time", 2, {})
    with pytest.raises(ranks.CaseError, match="gives other first weights on rank 1 than on rank 0"):
        ranks.run(2, train, plan, 1)


def test_a_rank_frees_the_whole_model_when_it_has_its_share() -> None:
    factory = Factory("tests.tf.keras_models:sequential", "", keras_models.LENGTH)
    made = make(factory, seed=SEED, precision=Precision(), device="/device:CPU:0")
    whole = [weakref.ref(weight._value) for weight in made.model.weights]
    name, (rows, columns) = "model/embedding/embeddings", (keras_models.VOCABULARY, keras_models.WIDTH)
    part = FirstValues(made).read(name, "weight", (rows - 2, 0), (2, columns))
    np.testing.assert_array_equal(part, made.model.weights[0].numpy()[-2:])
    assert made.description().parameters == made.model.count_params()
    made.let_go()
    gc.collect()
    assert all(value() is None for value in whole)
