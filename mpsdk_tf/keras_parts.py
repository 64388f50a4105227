"""The segments of a user's Keras model as the parts of a stage. See `mpsdk_tf.keras_model`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import keras
import tensorflow as tf

from mpsdk.plan import Plan
from mpsdk_tf.comm import TensorGroup
from mpsdk_tf.compiled import compiles_pieces
from mpsdk_tf.dropout import Site
from mpsdk_tf.graph import Call, Piece
from mpsdk_tf.keras_model import KerasModel
from mpsdk_tf.loss import cross_entropy_sum
from mpsdk_tf.recompute import keep_of
from mpsdk_tf.stage import Extras, Feed, Part
from mpsdk_tf.tensor import Tensor
from mpsdk_tf.topology import Groups


def keras_parts(
    plan: Plan,
    made: KerasModel,
    stage: int,
    unit_of: Mapping[str, int],
    groups: Groups,
    feed: Feed,
    *,
    training: bool,
) -> list[Part]:
    """The pieces of `stage` in order, each over weights of its own. The last of the model ends in the loss."""
    recompute = plan.distribution.activation_checkpointing
    first, last = stage == 0, stage == len(plan.stages) - 1
    turns = last and plan.schedule.turns_at_once
    numbers = made.numbers(plan.stages[stage], first=first, last=last)
    blocks = [number for number in numbers if made.part_of(number) == "block"]
    parts: list[Part] = []
    for number in numbers:
        is_block, ends = number in blocks, number == len(made.segments) - 1
        names = _names(made, number, copies=not first)
        piece = Piece(
            f"segment {number}",
            _call(plan, made, number, groups, training=training, ends=ends),
            keep=keep_of(recompute) if is_block else None,
            compiled=compiles_pieces(plan),
            split=plan.schedule.splits_backward and number > 0,
        )
        tied_here = number == 0 and len(plan.stages) == 1 and bool(made.tied)
        part = Part(
            piece,
            unit_of[names[0]],
            names,
            _extras(made, number, feed, groups.coordinates.tp, ends=ends),
            stays=turns and (ends or number == blocks[-1] or tied_here),
            offloads=is_block and recompute.offload,
        )
        parts.append(part)
    return parts


def _names(made: KerasModel, number: int, *, copies: bool) -> tuple[str, ...]:
    """The tensors of a segment. `copies`: its stage holds copies of its own of what ties it to the first segment."""
    names = tuple(made.names[id(weight)] for weight in made.segments[number].weights)
    return tuple(made.tied.get(name, name) for name in names) if copies else names


def _extras(made: KerasModel, number: int, feed: Feed, tp: int, *, ends: bool) -> Extras:
    """The seeds of a segment's random layers, if it has any, then the labels, if it ends in the loss."""
    sites = [
        Site(number, f"seed {place}", tp if id(seed) in made.draws_apart else 0)
        for place, seed in enumerate(made.segments[number].seeds)
    ]
    return feed.of(("labels",) if ends else (), sites)


def _call(plan: Plan, made: KerasModel, number: int, groups: Groups, *, training: bool, ends: bool) -> Call:
    """A segment, with the loss after it if it ends the model, as a function of weights, input, seeds and labels."""
    run, whole, random = made.segments[number]
    trained = {id(weight) for weight in made.model.trainable_variables}
    weights, seeds = (
        [(each, made.stand_ins.get(id(each), each)) for each in variables] for variables in (whole, random)
    )
    vocab_size = plan.description.vocab_size
    assert vocab_size is not None

    def call(parameters: list[Tensor], hidden: Tensor, extras: list[Tensor]) -> Tensor:
        mapping: list[tuple[Any, Tensor]] = [
            (
                stand_in,
                tf.reshape(value if id(weight) in trained else tf.stop_gradient(value), stand_in.shape),
            )
            for (weight, stand_in), value in zip(weights, parameters, strict=True)
        ]
        mapping += [(state, _state(extras[0][row])) for row, (_, state) in enumerate(seeds)]
        with keras.StatelessScope(state_mapping=mapping, initialize_variables=False):
            result = run(hidden, training)
        if not ends:
            return result
        group = groups.tensor if result.shape[-1] < vocab_size else TensorGroup()
        return cross_entropy_sum(result, extras[-1], vocab_size=vocab_size, group=group)

    return call


def _state(seed: Tensor) -> Tensor:
    """A state of Keras' random layers from a seed of two 64-bit numbers: they look at the low 31 bits only."""
    return tf.cast(tf.random.stateless_uniform((2,), seed, 0, 2**31 - 1, tf.int32), tf.int64)
