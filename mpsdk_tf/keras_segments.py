"""Where a Keras model is cut into segments, and how they are run. See `mpsdk_tf.keras_model`.

The calls that a Sequential or functional model is made of are known to Keras only under names that it keeps for itself; they
are used here and nowhere else: `_keras_history`, `_inbound_nodes`, `_keras_mask`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from mpsdk_tf.tensor import Tensor

_MATRIX = 2


class Segment(NamedTuple):
    """A part of the model: a function of hidden states (of ids, for the first) and of whether it is training; the weights
    and the random states of its layers."""

    run: Callable[[Tensor, bool], Tensor]
    weights: tuple[keras.Variable, ...]
    seeds: tuple[keras.Variable, ...]


class Ran(NamedTuple):
    """What a symbolic run has shown: the result of each segment, whether it had a mask; what the layers asked for; the
    variables that were read."""

    results: list[tf.TensorSpec]
    masked: list[bool]
    updated: list[keras.Variable]
    losses: int
    read: tuple[tf.Variable, ...] = ()


def can_be_cut(model: keras.Model) -> bool:
    """Whether it is Sequential or functional, and called as those are."""
    graph = isinstance(model, (keras.Sequential, keras.Function))
    return graph and type(model).call.__module__.startswith("keras.")


def last_of(model: keras.Model) -> Any:
    """What gives its output: an operation, or the model itself where that can't be told."""
    return _call_of(model.outputs[0]).operation if can_be_cut(model) else model


def segments_of(model: keras.Model, length: int) -> list[Segment]:
    """`length`: of the ids that the model will be called with. Its weights must be there."""
    if not can_be_cut(model):
        return [_segment([model], lambda hidden, training: model(hidden, training=training))]
    calls, cuts = _cuts(model)
    steps = [_between(calls, before, after) for before, after in pairwise(cuts)]
    masked = run_through([step.run for step in steps], model, 2, length).masked
    kept = list(range(len(cuts)))
    while (wrong := _wrong_cut(kept, steps, masked)) is not None:
        kept.remove(wrong)
    return [_between(calls, cuts[before], cuts[after]) for before, after in pairwise(kept)]


def _between(calls: Sequence[Any], before: _Cut, after: _Cut) -> Segment:
    """The calls between two cuts, made again on other tensors.

    Not `keras.Model(before, after)`: Keras 3.15 puts an input in the place of the layer that gave `before`, wherever that
    layer is called again.
    """
    made = calls[before.done : after.done]

    def run(hidden: Tensor, training: bool) -> Tensor:
        found = {id(before.tensor): hidden}
        for call in made:
            arguments, options = call.arguments.fill_in(found)
            if isinstance(call.operation, keras.Layer):
                options = {**options, "training": training}
            results = keras.tree.flatten(call.operation(*arguments, **options))
            found |= {id(tensor): result for tensor, result in zip(call.outputs, results, strict=True)}
        return found[id(after.tensor)]

    return _segment([call.operation for call in made if isinstance(call.operation, keras.Layer)], run)


def _segment(layers: Sequence[keras.Layer], run: Callable[[Tensor, bool], Tensor]) -> Segment:
    weights = {id(weight): weight for layer in layers for weight in layer.weights}
    variables = {id(variable): variable for layer in layers for variable in layer.variables}
    seeds = tuple(variable for key, variable in variables.items() if key not in weights)
    return Segment(run, tuple(weights.values()), seeds)


def _wrong_cut(kept: Sequence[int], steps: Sequence[Segment], masked: Sequence[bool]) -> int | None:
    """One of the cuts `kept` that is not to be; None when all the rest are good. Ends are no cuts."""
    for cut in kept[1:-1]:
        if masked[cut - 1]:
            return cut
    held = [
        {id(weight): weight for step in steps[before:after] for weight in step.weights}
        for before, after in pairwise(kept)
    ]
    last = len(held) - 1
    for number, weights in enumerate(held):
        if last and not any(len(weight.shape) >= _MATRIX for weight in weights.values()):
            return kept[number + 1] if number < last else kept[number]
        for other in range(number + 1, last + 1):
            ends = (number, other) == (0, last) and last > 1
            if not ends and weights.keys() & held[other].keys():
                return kept[number + 1]
    return None


class _Cut(NamedTuple):
    """A symbolic tensor that all of a model goes through, and how many calls have been made when it is there."""

    tensor: Any
    done: int


def _cuts(model: keras.Model) -> tuple[list[Any], list[_Cut]]:
    """The calls of a model in order, and its cuts: its input, those between, its output."""
    (start,), (end,) = model.inputs, model.outputs
    calls = _calls(end)
    waiting = Counter(id(tensor) for call in calls for tensor in call.input_tensors)
    waiting[id(end)] += 1
    cuts: list[_Cut] = []
    live: dict[int, Any] = {}
    for done, call in enumerate(calls, start=1):
        for tensor in call.input_tensors:
            waiting[id(tensor)] -= 1
            if not waiting[id(tensor)]:
                live.pop(id(tensor), None)
        live |= {id(tensor): tensor for tensor in call.outputs if waiting[id(tensor)]}
        if len(live) == 1:
            (only,) = live.values()
            if only is start or only is end or tf.as_dtype(only.dtype).is_floating:
                cuts.append(_Cut(only, done))
    return calls, cuts


def _calls(end: Any) -> list[Any]:
    """The calls that lead to a symbolic tensor, each after those whose results it takes."""
    ordered: dict[int, Any] = {}
    waiting: list[tuple[Any, bool]] = [(_call_of(end), False)]
    while waiting:
        call, ready = waiting.pop()
        if id(call) in ordered:
            continue
        if ready:
            ordered[id(call)] = call
        else:
            waiting.append((call, True))
            waiting += [(_call_of(tensor), False) for tensor in call.input_tensors]
    return list(ordered.values())


def _call_of(tensor: Any) -> Any:
    """The call that gave a symbolic tensor."""
    history = tensor._keras_history
    return history.operation._inbound_nodes[history.node_index]


def run_through(
    parts: Sequence[Callable[[Tensor, bool], Tensor]], model: keras.Model, rows: int, length: int
) -> Ran:
    """Trace `parts` of `model`, one after another, as in training."""
    found = Ran([], [], [], 0)
    losses: list[Tensor] = []

    def call(ids: Tensor) -> None:
        with keras.StatelessScope(collect_losses=True, initialize_variables=False) as scope:
            hidden = ids
            for part in parts:
                hidden = part(hidden, True)
                found.results.append(tf.TensorSpec(hidden.shape, hidden.dtype))
                found.masked.append(getattr(hidden, "_keras_mask", None) is not None)
            found.updated.extend(
                each for each in model.variables if scope.get_current_value(each) is not None
            )
            losses.extend(scope.losses)

    ran = tf.function(call, autograph=False).get_concrete_function(tf.TensorSpec((rows, length), tf.int32))
    return found._replace(losses=len(losses), read=tuple(ran.variables))
