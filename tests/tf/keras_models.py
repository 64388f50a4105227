"""Factories of Keras models, as a user would write them: ids (batch, length) to logits (batch, length, 101)."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np

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
