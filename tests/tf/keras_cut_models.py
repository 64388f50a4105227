"""Factories of Keras models for tensor parallelism: whose layers are cut, with twins of Keras' layers and of a user's own, and
those that can't be."""

from __future__ import annotations

from typing import Any, ClassVar

import keras
import numpy as np

from mpsdk_tf import set_tensor_parallelism, tensor_group, tensor_parallelism, tp_register_with_module
from mpsdk_tf.comm import enter_parallel, leave_parallel
from tests.tf.keras_models import LENGTH, VOCABULARY, WIDTH, functional, sequential


def tied() -> keras.Model:
    return functional(VOCABULARY + 3, logit_soft_cap=4.0)


def padded() -> keras.Model:
    """Attention takes the mask of the padding id, and takes it off what it was given."""
    ids = keras.Input((None,), dtype="int32")
    hidden = keras.layers.Embedding(VOCABULARY, WIDTH, mask_zero=True)(ids)
    for _ in range(2):
        attention = keras.layers.MultiHeadAttention(4, WIDTH // 4)(hidden, hidden, use_causal_mask=True)
        hidden = keras.layers.Add()([hidden, keras.layers.Dense(WIDTH, activation="tanh")(attention)])
    return keras.Model(ids, keras.layers.Dense(VOCABULARY)(hidden))


def einsums() -> keras.Model:
    """EinsumDense layers that turn dimensions, with biases of some of them; the logits are of an even vocabulary."""
    ids = keras.Input((None,), dtype="int32")
    hidden = keras.layers.Embedding(VOCABULARY + 3, WIDTH)(ids)
    heads = keras.layers.EinsumDense("abc,cde->adbe", (4, None, 8), bias_axes="de", name="heads")(hidden)
    mixed = keras.layers.EinsumDense("adbe,def->abf", (None, WIDTH), bias_axes="f", name="mixed")(heads)
    hidden = keras.layers.LayerNormalization()(hidden + mixed)
    apart = keras.layers.EinsumDense(
        "...x,xyz->...yz", (6, 7), bias_axes="z", activation="gelu", name="apart"
    )(hidden)
    flat = keras.layers.Reshape((-1, 42))(apart)
    hidden = hidden + keras.layers.Dense(WIDTH, activation="tanh", name="narrow")(flat)
    return keras.Model(ids, keras.layers.Dense(VOCABULARY + 3, name="logits")(hidden), name="einsums")


def styled() -> keras.Model:
    """A pair of layers that communicates once; an embedding cut by rows; a layer that is left whole."""
    layers = [keras.Input((None,), dtype="int32"), keras.layers.Embedding(VOCABULARY + 3, WIDTH)]
    up, down = keras.layers.Dense(64, activation="relu"), keras.layers.Dense(WIDTH)
    whole, logits = keras.layers.Dense(WIDTH, activation="tanh"), keras.layers.Dense(VOCABULARY)
    model = keras.Sequential([*layers, up, down, whole, logits], name="styled")
    set_tensor_parallelism(model.layers[0], style="embedding_rowwise")
    set_tensor_parallelism(up, style="colwise")
    set_tensor_parallelism(down, style="rowwise")
    return model


class Mixer(keras.layers.Layer):
    """A user's layer, which gives a pair."""

    def __init__(self, inner: int, **options: Any) -> None:
        super().__init__(**options)
        self.inner = inner
        self.up, self.down = keras.layers.Dense(inner), keras.layers.Dense(WIDTH)

    def build(self, shape: tuple[int | None, ...]) -> None:
        self.up.build(shape)
        self.gain = self.add_weight(name="gain", shape=(self.inner,), initializer="ones")
        self.down.build((*shape[:-1], self.inner))

    def call(self, hidden: Any, scale: float = 1.0) -> Any:
        return hidden, scale * self.down(self.gain * keras.ops.tanh(self.up(hidden)))


class ParallelMixer(keras.layers.Layer):
    """Made at this rank's size, for the ranks of `tensor_group()`."""

    cuts: ClassVar = {"up/kernel": 1, "up/bias": 0, "gain": 0, "down/kernel": 0}

    def __init__(self, inner: int, **options: Any) -> None:
        super().__init__(**options)
        self.group = tensor_group()
        self.own = inner // self.group.size
        self.up, self.down = keras.layers.Dense(self.own), keras.layers.Dense(WIDTH)

    def build(self, shape: tuple[int | None, ...]) -> None:
        self.up.build(shape)
        self.gain = self.add_weight(name="gain", shape=(self.own,), initializer="ones")
        self.down.build((*shape[:-1], self.own))

    def call(self, hidden: Any) -> Any:
        mixed = self.gain * keras.ops.tanh(self.up(enter_parallel(hidden, self.group)))
        return leave_parallel(keras.ops.matmul(mixed, self.down.kernel), self.group) + self.down.bias


def _register() -> None:
    def translate(hidden: Any, scale: float = 1.0) -> Any:
        assert scale == 1.0
        return (hidden,), {}

    tp_register_with_module(
        Mixer,
        ParallelMixer,
        init_hook=lambda layer: None if layer.inner % 2 else ((layer.inner,), {}),
        forward_hook=translate,
        return_hook=lambda mixed: (mixed, mixed),
    )


_register()


def mixers() -> keras.Model:
    """Layers of one's own, of which one is left whole by its init hook."""
    ids = keras.Input((None,), dtype="int32")
    hidden = keras.layers.Embedding(VOCABULARY, WIDTH)(ids)
    with tensor_parallelism():
        hidden = hidden + Mixer(48)(hidden)[1]
        hidden = hidden + Mixer(15)(hidden)[1]
    return keras.Model(ids, keras.layers.Dense(VOCABULARY)(hidden), name="mixers")


# -- what can't be cut ------------------------------------------------------------------------------------------------


def left_whole() -> keras.Model:
    layers = [keras.Input((None,), dtype="int32"), keras.layers.Embedding(VOCABULARY, WIDTH)]
    model = keras.Sequential([*layers, keras.layers.Dense(VOCABULARY)], name="whole")
    set_tensor_parallelism(model, False)
    return model


def with_unknown_style() -> keras.Model:
    model = sequential()
    set_tensor_parallelism(model.layers[-1], style="sideways")
    return model


def with_softmax_of_a_part() -> keras.Model:
    between = keras.layers.Dense(WIDTH, activation="softmax")
    set_tensor_parallelism(between, style="colwise")
    return sequential(between=between)


def with_unknown_setting() -> keras.Model:
    model = sequential()
    set_tensor_parallelism(model.layers[0], sideways=True)
    return model


def half_a_pair() -> keras.Model:
    """The first of the two layers of a block gives a part that nothing takes."""
    model = sequential()
    set_tensor_parallelism(model.layers[2].up, style="colwise")
    return model


class Misfit(keras.layers.Layer):
    def build(self, shape: tuple[int | None, ...]) -> None:
        self.kernel = self.add_weight(name="kernel", shape=(WIDTH, WIDTH))
        self.gain = self.add_weight(name="gain", shape=(WIDTH,))

    def call(self, hidden: Any) -> Any:
        return self.gain * keras.ops.matmul(hidden, self.kernel)


class ParallelMisfit(keras.layers.Layer):
    cuts: ClassVar = {"kernel": 0, "nothing": 1}

    def build(self, shape: tuple[int | None, ...]) -> None:
        self.kernel = self.add_weight(name="kernel", shape=(WIDTH, 7))
        self.other = self.add_weight(name="other", shape=(WIDTH,))


tp_register_with_module(Misfit, ParallelMisfit)


class WrongCuts(ParallelMixer):
    """Its weights are not cut as it says."""

    cuts: ClassVar = {"up/kernel": 0, "up/bias": 0, "gain": 0, "down/kernel": 1}


class OtherMixer(Mixer):
    """With a twin that says wrong dimensions."""


class WithoutCuts(keras.layers.Layer):
    def build(self, shape: tuple[int | None, ...]) -> None:
        self.kernel = self.add_weight(name="kernel", shape=(WIDTH, WIDTH))
        self.gain = self.add_weight(name="gain", shape=(WIDTH,))


class Unsaid(Misfit):
    pass


tp_register_with_module(OtherMixer, WrongCuts, init_hook=lambda layer: ((layer.inner,), {}))
tp_register_with_module(Unsaid, WithoutCuts)


def wrongly_cut() -> keras.Model:
    ids = keras.Input((None,), dtype="int32")
    hidden = OtherMixer(48)(keras.layers.Embedding(VOCABULARY, WIDTH)(ids))[1]
    return keras.Model(ids, keras.layers.Dense(VOCABULARY)(hidden), name="wrong")


def without_cuts() -> keras.Model:
    return sequential(between=Unsaid(name="unsaid"))


class Peeking(keras.Model):
    """Projects with the table of its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = keras.layers.Embedding(VOCABULARY, WIDTH)
        self.mix = keras.layers.Dense(WIDTH)

    def call(self, ids: Any, training: bool = False) -> Any:
        return keras.ops.matmul(self.mix(self.tokens(ids)), keras.ops.transpose(self.tokens.embeddings))


def peeking() -> keras.Model:
    model = Peeking()
    model(np.zeros((1, LENGTH), np.int32))
    return model


def told_before_it_is_built() -> keras.Model:
    """What is said of a layer holds for those that it makes when it is built."""
    attention = keras.layers.MultiHeadAttention(3, 5)
    set_tensor_parallelism(attention, False)
    ids = keras.Input((None,), dtype="int32")
    hidden = keras.layers.Embedding(VOCABULARY, WIDTH)(ids)
    hidden = hidden + attention(hidden, hidden, use_causal_mask=True)
    return keras.Model(ids, keras.layers.Dense(VOCABULARY)(hidden), name="told")


def with_misfits() -> keras.Model:
    return sequential(between=Misfit(name="misfits"))


class Borrowing(keras.layers.Layer):
    """Computes with another layer's weight."""

    def __init__(self, lender: keras.layers.Dense, **options: Any) -> None:
        super().__init__(**options)
        self.kernel = lender.kernel

    def call(self, hidden: Any) -> Any:
        return keras.ops.matmul(hidden, self.kernel)


def borrowing() -> keras.Model:
    ids = keras.Input((None,), dtype="int32")
    lender = keras.layers.Dense(WIDTH)
    hidden = lender(keras.layers.Embedding(VOCABULARY, WIDTH)(ids))
    return keras.Model(ids, keras.layers.Dense(VOCABULARY)(Borrowing(lender)(hidden)))
