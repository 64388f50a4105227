"""GPT-2 as a person writes it with Keras' own layers, and Keras' optimizer as near to everybody else's as it goes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import keras
from keras import layers

from benchmarks.contenders import Seat
from benchmarks.sizes import LEARNING_RATE, MAX_GRAD_NORM, WEIGHT_DECAY
from mpsdk.backend import WEIGHT
from mpsdk.families import read_model
from mpsdk.families.describe import describe_spec
from mpsdk.families.hf import HuggingFaceSource

EPSILON = 1e-8


class Positions(layers.Layer):
    """Adds a learned row for each position. (batch, length, width) -> the same."""

    def __init__(self, positions: int, **options: Any) -> None:
        super().__init__(**options)
        self.positions = positions

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        self.table: Any = self.add_weight(shape=(self.positions, input_shape[-1]), name="table")

    def call(self, hidden: Any) -> Any:
        return hidden + self.table[: hidden.shape[1]]


def gpt2(seat: Seat) -> keras.Model:
    """Token ids (batch, length) -> logits (batch, length, vocabulary), with the weights that every contender starts from."""
    config = seat.size.config
    width, heads = config["n_embd"], config["n_head"]
    ids = keras.Input((seat.size.length,), dtype="int32")
    tokens = layers.ReversibleEmbedding(config["vocab_size"], width, name="tokens")
    hidden = Positions(config["n_positions"], name="positions")(tokens(ids))
    for block in range(config["n_layer"]):
        normed = _norm(f"{block}.attention_norm")(hidden)
        attention = layers.MultiHeadAttention(heads, width // heads, name=f"{block}.attention")
        hidden = layers.add([hidden, attention(normed, normed, use_causal_mask=True)])
        normed = _norm(f"{block}.feed_forward_norm")(hidden)
        up = layers.Dense(4 * width, activation=_gelu, name=f"{block}.up")(normed)
        hidden = layers.add([hidden, layers.Dense(width, name=f"{block}.down")(up)])
    model = keras.Model(ids, tokens(_norm("norm")(hidden), reverse=True))
    _fill(model, seat)
    return model


def _norm(name: str) -> layers.LayerNormalization:
    return layers.LayerNormalization(epsilon=1e-5, name=name)


def _gelu(x: Any) -> Any:
    return keras.activations.gelu(x, approximate=True)


def _fill(model: keras.Model, seat: Seat) -> None:
    """Keras' variables from the model's directory, where a matrix lies as (outputs, inputs) and heads are joined."""
    read = read_model(seat.model)
    assert read.directory is not None
    source = HuggingFaceSource(read.directory, read.family, read.spec)
    shapes = {tensor.name: tensor.shape for tensor in describe_spec(read.spec).tensors()}
    for name, variable in _canonical(model, seat.size.config["n_layer"]):
        values = source.read(name, WEIGHT, (0,) * len(shapes[name]), shapes[name])
        turned = values.T if variable.name == "kernel" else values
        variable.assign(turned.reshape(variable.shape))


def _canonical(model: keras.Model, blocks: int) -> Iterator[tuple[str, Any]]:
    """Every variable, and the canonical name of what it holds."""
    yield "embedding.tokens.weight", model.get_layer("tokens").embeddings
    yield "embedding.positions.weight", model.get_layer("positions").table
    norms = {"head.norm": "norm"}
    for block in range(blocks):
        prefix = f"blocks.{block}"
        norms |= {f"{prefix}.{norm}": f"{block}.{norm}" for norm in ("attention_norm", "feed_forward_norm")}
        attention = model.get_layer(f"{block}.attention")
        linears = {
            "attention.query": attention.query_dense,
            "attention.key": attention.key_dense,
            "attention.value": attention.value_dense,
            "attention.output": attention.output_dense,
            "feed_forward.up": model.get_layer(f"{block}.up"),
            "feed_forward.down": model.get_layer(f"{block}.down"),
        }
        for name, layer in linears.items():
            yield f"{prefix}.{name}.weight", layer.kernel
            yield f"{prefix}.{name}.bias", layer.bias
    for name, layer in norms.items():
        yield f"{name}.weight", model.get_layer(layer).gamma
        yield f"{name}.bias", model.get_layer(layer).beta


def adamw(model: keras.Model) -> keras.optimizers.AdamW:
    """Keras' AdamW with decay for matrices only and the numbers that mpsdk takes.

    Keras adds epsilon to the root before it corrects the bias, so that in step t it weighs 1 / sqrt(1 - 0.999^t) times
    what it does elsewhere; at 1e-8 the losses show nothing of it.
    """
    optimizer = keras.optimizers.AdamW(
        LEARNING_RATE, WEIGHT_DECAY, epsilon=EPSILON, global_clipnorm=MAX_GRAD_NORM
    )
    vectors = [variable for variable in model.trainable_variables if _is_vector(variable)]
    optimizer.exclude_from_weight_decay(var_list=vectors)
    return optimizer


def _is_vector(variable: Any) -> bool:
    """A bias or a norm's weight; Keras gives an attention's biases the shape (heads, width of a head)."""
    return variable.name == "bias" or len(variable.shape) < 2


def cross_entropy() -> keras.losses.Loss:
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)
