"""Dropout whose mask is a function of where it stands, never of what ran before.

The seed of a mask derives from (seed, step, microbatch, block, site), and from the tensor-parallel coordinate where
the tensor is split, so that recomputation repeats it and a resumed run continues it. The backward makes the mask again
instead of keeping it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import tensorflow as tf

from mpsdk_tf.tensor import Tensor


class Moment(NamedTuple):
    """When a forward pass happens: the run's seed, and as scalars the step, and the microbatch over the global batch."""

    seed: int
    step: Tensor
    microbatch: Tensor


class Site(NamedTuple):
    """Where in the model a mask is drawn. `part` is the tensor-parallel coordinate where the tensor is split, else 0."""

    block: int  # -1: the embedding
    name: str
    part: int


def seeds_at(moment: Moment, sites: Sequence[Site]) -> Tensor:
    """The seed of each site's mask, int64 of shape (sites, 2)."""
    texts = [":".join(map(str, (moment.seed, *site))) for site in sites]
    places = [
        int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "little") for text in texts
    ]
    when = tf.cast(moment.step, tf.int64) * (1 << 31) + tf.cast(moment.microbatch, tf.int64)
    return tf.stack([tf.constant(places, tf.int64), tf.fill((len(sites),), when)], axis=1)


def dropout(tensor: Tensor, probability: float, seed: Tensor | None, *, training: bool) -> Tensor:
    """`tensor` with elements dropped while training, the rest scaled by 1 / (1 - probability).

    `seed`: of shape (2,); None (ordinary use of the model) takes TensorFlow's own.
    """
    if probability == 0.0 or not training:
        return tensor
    known: Tensor = any_seed() if seed is None else seed

    def apply(values: Tensor) -> Tensor:
        uniform = tf.random.stateless_uniform(tf.shape(values), known, dtype=tf.float32)
        kept = tf.cast(uniform >= probability, values.dtype)
        return values * kept * tf.cast(1.0 / (1.0 - probability), values.dtype)

    @tf.custom_gradient
    def drop(values: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        return apply(values), apply

    return drop(tensor)


def any_seed() -> Tensor:
    """A seed from TensorFlow's own generator."""
    return tf.random.uniform((2,), maxval=tf.int64.max, dtype=tf.int64)
