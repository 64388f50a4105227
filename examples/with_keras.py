"""An exported model in TensorFlow: an ordinary Keras model on one device. transformers has no models for TensorFlow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

import mpsdk_tf

NAME = "Keras"


def load(directory: Path) -> Any:
    return mpsdk_tf.from_pretrained(directory)


def loss_of(model: Any, inputs: NDArray[np.int64], labels: NDArray[np.int64], rows: int = 32) -> float:
    """Mean loss a token; `inputs` and `labels` are (samples, length)."""
    total = 0.0
    for start in range(0, len(inputs), rows):
        logits = model(inputs[start : start + rows])
        wanted = labels[start : start + rows]
        losses = tf.nn.sparse_softmax_cross_entropy_with_logits(labels=wanted, logits=logits)
        total += float(tf.reduce_sum(losses))
    return total / labels.size


def continuation(model: Any, prompt: str, *, end: int, length: int = 110) -> str:
    """`prompt` and what the model writes after it, sampled from the eight likeliest bytes at a time, as far as `end`."""
    random = np.random.default_rng(0)
    ids = list(prompt.encode())
    for _ in range(length):
        likeliest = tf.math.top_k(model(np.array([ids]))[0, -1], k=8)
        shares = tf.nn.softmax(tf.cast(likeliest.values, tf.float64)).numpy()
        token = int(random.choice(likeliest.indices.numpy(), p=shares))
        if token == end:
            break
        ids.append(token)
    return bytes(ids).decode(errors="replace")
