"""Factories of Keras models, as a user would write them: ids (batch, length) to logits (batch, length, 101)."""

from __future__ import annotations

from typing import Any, ClassVar

import keras
import numpy as np

from mpsdk_tf import set_tensor_parallelism, tensor_group, tensor_parallelism, tp_register_with_module
from mpsdk_tf.comm import enter_parallel, leave_parallel

VOCABULARY, WIDTH, LENGTH = 101, 32, 16


class Block(keras.layers.Layer):
    """A pre-norm transformer block with a number of its own that scales what it adds."""

    def __init__(self, dropout: float = 0.0, **options: Any) -> None:
        super().__init__(**options)
        self.norm = keras.layers.LayerNormalization()
        self.attention = keras.layers.MultiHeadAttention(4, WIDTH // 4, use_bias=False)
        self.up = keras.layers.Dense(4 * WIDTH, activation="gelu")
        self.down = keras.layers.Dense(WIDTH)
        self.dropout = keras.layers.Dropout(dropout)

    def build(self, shape: tuple[int | None, ...]) -> None:
        self.norm.build(shape)
        self.attention.build(shape, shape)
        self.up.build(shape)
        self.down.build((*shape[:-1], 4 * WIDTH))
        self.gain = self.add_weight(name="gain", shape=(), initializer="ones")

    def call(self, hidden: Any, training: bool = False) -> Any:
        normed = self.norm(hidden)
        hidden = hidden + self.attention(normed, normed, use_causal_mask=True)
        return hidden + self.gain * self.dropout(self.down(self.up(hidden)), training=training)


class Positions(keras.layers.Layer):
    """Adds a fixed table that the layer holds as a tensor."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        angles = np.arange(64)[:, None] / 100.0 ** (np.arange(WIDTH)[None, :] / WIDTH)
        self.table = keras.ops.convert_to_tensor(0.1 * np.sin(angles), "float32")

    def call(self, hidden: Any) -> Any:
        table: Any = self.table
        return hidden + keras.ops.cast(table[: hidden.shape[1]], hidden.dtype)


def residual() -> keras.Model:
    """A feed-forward block as a model of its own."""
    hidden = keras.Input((None, WIDTH))
    normed = keras.layers.LayerNormalization()(hidden)
    branch = keras.Sequential([keras.layers.Dense(48, activation="gelu"), keras.layers.Dense(WIDTH)])
    return keras.Model(hidden, hidden + branch(normed))


def sequential(dropout: float = 0.0, between: Any = None, vocabulary: int = VOCABULARY) -> keras.Model:
    layers = [keras.Input((None,), dtype="int32"), keras.layers.Embedding(vocabulary, WIDTH), Positions()]
    layers += [Block(dropout), residual()]
    if between is not None:
        layers.append(between)
    layers += [keras.layers.LayerNormalization(), keras.layers.Dense(vocabulary)]
    return keras.Sequential(layers, name="model")


def of_bytes() -> keras.Model:
    return sequential(vocabulary=257)


def dropping() -> keras.Model:
    return sequential(dropout=0.2)


def functional(vocabulary: int = VOCABULARY, **options: Any) -> keras.Model:
    """Residual branches; the widths between blocks differ; the table is tied to the output."""
    ids = keras.Input((None,), dtype="int32")
    table = keras.layers.ReversibleEmbedding(vocabulary, WIDTH, **options)
    hidden = table(ids)
    normed = keras.layers.LayerNormalization()(hidden)
    attention = keras.layers.MultiHeadAttention(4, WIDTH // 4)(normed, normed, use_causal_mask=True)
    hidden = keras.layers.Add()([hidden, attention])
    wide = keras.layers.Dense(2 * WIDTH, activation="gelu")(hidden)
    hidden = keras.layers.LayerNormalization()(keras.layers.Dense(WIDTH)(wide))
    return keras.Model(ids, table(hidden, reverse=True), name="tied")


def frozen() -> keras.Model:
    """With a BatchNormalization that trains nothing, and a Dense layer that doesn't either."""
    model = sequential(between=keras.layers.BatchNormalization())
    model.layers[2].trainable = False
    model.layers[-3].trainable = False
    return model


class Subclassed(keras.Model):
    def __init__(self) -> None:
        super().__init__()
        self.tokens = keras.layers.Embedding(VOCABULARY, WIDTH)
        self.block = residual()
        self.projection = keras.layers.Dense(VOCABULARY)

    def call(self, ids: Any, training: bool = False) -> Any:
        return self.projection(self.block(self.tokens(ids)))


def subclassed() -> keras.Model:
    model = Subclassed()
    model(np.zeros((1, LENGTH), np.int32))
    return model


# -- cut by tensor parallelism ----------------------------------------------------------------------------------------


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


# -- what can't be trained --------------------------------------------------------------------------------------------


def with_batch_norm() -> keras.Model:
    return sequential(between=keras.layers.BatchNormalization(name="batch_norm"))


def with_regularizer() -> keras.Model:
    return sequential(between=keras.layers.Dense(WIDTH, kernel_regularizer="l2"))


def with_activity_regularizer() -> keras.Model:
    return sequential(between=keras.layers.ActivityRegularization(l2=0.1))


class Penalised(keras.layers.Layer):
    def call(self, hidden: Any) -> Any:
        self.add_loss(keras.ops.sum(hidden))
        return hidden


def with_loss_of_its_own() -> keras.Model:
    return sequential(between=Penalised())


def too_short() -> keras.Model:
    layers = [keras.Input((8,), dtype="int32"), keras.layers.Embedding(VOCABULARY, WIDTH)]
    return keras.Sequential([*layers, keras.layers.Dense(VOCABULARY)])


def shared() -> keras.Model:
    ids = keras.Input((None,), dtype="int32")
    table, mix = keras.layers.ReversibleEmbedding(VOCABULARY, WIDTH), keras.layers.Dense(WIDTH)
    hidden = mix(keras.layers.Dense(WIDTH)(mix(table(ids))))
    return keras.Model(ids, table(keras.layers.Dense(WIDTH)(mix(hidden)), reverse=True))


def with_softmax() -> keras.Model:
    model = sequential()
    model.add(keras.layers.Softmax())
    return model


def compiled() -> keras.Model:
    model = sequential()
    model.compile("adam", "mse")
    return model


def unbuilt() -> keras.Model:
    return keras.Sequential([keras.layers.Embedding(VOCABULARY, WIDTH), keras.layers.Dense(VOCABULARY)])


def pooled() -> keras.Model:
    ids = keras.Input((None,), dtype="int32")
    hidden = keras.layers.Embedding(VOCABULARY, WIDTH)(ids)
    return keras.Model(ids, keras.layers.Dense(VOCABULARY)(keras.layers.GlobalAveragePooling1D()(hidden)))


def nothing() -> object:
    return {"a": "dictionary"}


def failing() -> keras.Model:
    raise ArithmeticError("the factory's own message")


not_a_callable = 7


def masked() -> keras.Model:
    """The mask of the padding id passes all blocks."""
    layers = [keras.Input((None,), dtype="int32"), keras.layers.Embedding(VOCABULARY, WIDTH, mask_zero=True)]
    layers += [keras.layers.Dense(WIDTH) for _ in range(3)]
    return keras.Sequential([*layers, keras.layers.Dense(VOCABULARY)])


_starts = np.random.default_rng()


def different_each_time() -> keras.Model:
    model = sequential()
    model.layers[-1].bias.assign(_starts.normal(size=VOCABULARY))
    return model
