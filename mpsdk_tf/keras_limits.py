"""What a Keras model may ask for that the training would leave out: refused, each with the layers that ask."""

from __future__ import annotations

from collections.abc import Iterator

import keras

from mpsdk_tf.keras_segments import last_of


def problems_of(model: object) -> list[str]:
    """What can be seen of what a factory gave, without calling it."""
    if keras.backend.backend() != "tensorflow":
        return [f"Keras computes with {keras.backend.backend()} here; set KERAS_BACKEND=tensorflow"]
    if not isinstance(model, keras.Model):
        return [f"gave a {type(model).__name__}; it must give a Keras model"]
    if not model.built:
        return [
            "gave a model that is not built; begin with keras.Input, or call it once on ids in the factory"
        ]
    return [*_of_ends(model), *_of_weights(model), *_of_layers(model)]


def _of_ends(model: keras.Model) -> Iterator[str]:
    for what in ("inputs", "outputs"):
        tensors = getattr(model, what, None)  # a subclassed model has neither
        if tensors is not None and len(tensors) != 1:
            yield f"has {len(tensors)} {what}; it must have one: ids in, logits out"
            return
    if model.compiled:
        yield "is compiled; leave compile() out: the training's settings say the optimizer and the loss"
    end = last_of(model)
    if isinstance(end, keras.layers.Softmax) or getattr(end, "activation", None) is keras.activations.softmax:
        yield f"ends in a softmax ({end.name}); it must give logits: leave the softmax out"


def _of_weights(model: keras.Model) -> Iterator[str]:
    if not model.trainable_variables:
        yield "has no weight to train"
    others = sorted({weight.path for weight in model.weights if weight.dtype != "float32"})
    if others:
        yield f"has weights that are not float32: {_listed(others)}; distribution.precision says what to compute in"
    for what in ("regularizer", "constraint"):
        asking = [weight.path for weight in model.weights if getattr(weight, what, None) is not None]
        if asking:
            yield f"weights have a {what}, which would be left out: {_listed(asking)}; remove it"


def _of_layers(model: keras.Model) -> Iterator[str]:
    asking = [
        layer.path or layer.name
        for layer in model._flatten_layers(include_self=True, recursive=True)
        if getattr(layer, "activity_regularizer", None) is not None
    ]
    if asking:
        yield f"layers have an activity_regularizer, which would be left out: {_listed(asking)}; remove it"


def _listed(names: list[str], most: int = 4) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
