"""The layers of a user's Keras model that tensor parallelism cuts, and their parallel twins in their place.

A model is planned with the twins of one rank: what they cut, and that their weights are the layers' own. On the ranks, each
layer's `call` becomes its twin's; the layers, and all that they are in, stay where they are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, cast

import keras

from mpsdk.errors import ConfigError, Problem
from mpsdk_tf.comm import TensorGroup
from mpsdk_tf.register import mark_of, twin_of
from mpsdk_tf.twins import ParallelTwin, Twin, making_for


class Cut(NamedTuple):
    """Which dimension of a weight is cut, and of which layer it is, for messages."""

    dimension: int
    layer: str


class Pair(NamedTuple):
    """A layer and its twin, made at the size of a group."""

    layer: keras.layers.Layer
    made: keras.layers.Layer
    twin: Twin


def cuts_of(model: keras.Model, end: Any) -> dict[int, Cut]:
    """By a weight's identity, how it is cut. `end`: the operation that gives the model's output.

    Raises ConfigError: every layer that is to be cut and whose twin can't be made, or has other weights.
    """
    problems: list[Problem] = []
    pairs = _pairs(model, end, TensorGroup(), problems)
    cuts: dict[int, Cut] = {}
    of_twins = Counter[int]()
    for pair in pairs:
        problems += _other_weights(pair)
        weights = _weights(pair.layer)
        of_twins.update({id(weight) for weight in weights.values()})
        for path, dimension in cast("ParallelTwin", pair.made).cuts.items():
            if path in weights:
                cuts[id(weights[path])] = Cut(dimension, pair.layer.path or pair.layer.name)
    problems += _shared_with_whole(model, pairs, cuts, of_twins)
    if problems:
        raise ConfigError(problems, where="tensor parallelism of the model")
    return cuts


def put_in_place(model: keras.Model, end: Any, group: TensorGroup) -> dict[int, keras.Variable]:
    """Have the layers of `model` compute as their twins of `group` do. Gives, by the identity of a layer's variable (a weight,
    or the state of a random layer), the twin's."""
    problems: list[Problem] = []
    pairs = _pairs(model, end, group, problems)
    if problems:
        raise ConfigError(problems, where="tensor parallelism of the model")
    variables: dict[int, keras.Variable] = {}
    for layer, made, twin in pairs:
        theirs = dict(_variables(made))
        for path, variable in _variables(layer):
            if path in theirs:
                variables[id(variable)] = theirs[path]
        layer.__dict__["call"] = _translated(made, twin)
        layer.input_spec = None  # it may be given a part; the twin looks for itself
    return variables


def _pairs(model: keras.Model, end: Any, group: TensorGroup, problems: list[Problem]) -> list[Pair]:
    pairs: list[Pair] = []
    with making_for(group):
        for layer, twin in _to_cut(model):
            where = layer.path or layer.name
            try:
                arguments = _arguments(layer, twin, ends=layer is end)
                if arguments is None:
                    continue
                made = twin.dist_module(*arguments[0], **arguments[1])
                if not made.built:
                    made.build_from_config(layer.get_build_config() or {})
            except Exception as error:  # whatever the twin raises
                remedy = (
                    f"its twin {twin.dist_module.__name__} can't be made: {type(error).__name__}: {error}; leave the layer "
                    "whole with mpsdk_tf.set_tensor_parallelism(layer, False)"
                )
                problems.append(Problem(where, type(layer).__name__, remedy))
                continue
            pairs.append(Pair(layer, made, twin))
    return pairs


def _arguments(
    layer: keras.layers.Layer, twin: Twin, *, ends: bool
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    mark = mark_of(layer)
    settings = dict(mark.settings) if mark is not None else {}
    if ends and twin.can_end:
        settings = {"ends": True, **settings}
    if twin.init_hook is None:
        return (), {**layer.get_config(), **settings}
    given = twin.init_hook(layer)
    return None if given is None else (tuple(given[0]), {**given[1], **settings})


def _to_cut(model: keras.Model) -> list[tuple[keras.layers.Layer, Twin]]:
    """The outermost layers with a twin that are to be cut, each once."""
    marks = [mark_of(layer) for layer in model._flatten_layers(include_self=True, recursive=True)]
    otherwise = not any(mark is not None and mark.enabled for mark in marks)
    found: dict[int, tuple[keras.layers.Layer, Twin]] = {}

    def look(layer: keras.layers.Layer) -> None:
        mark, twin = mark_of(layer), twin_of(layer)
        if twin is not None and (otherwise if mark is None else mark.enabled):
            found[id(layer)] = (layer, twin)
            return
        for inner in layer._flatten_layers(include_self=False, recursive=False):
            look(inner)

    look(model)
    return list(found.values())


def _other_weights(pair: Pair) -> Iterator[Problem]:
    """What differs between a layer's weights and those of its twin for one rank."""
    ours, theirs = _weights(pair.layer), _weights(pair.made)
    name, kind = pair.layer.path or pair.layer.name, type(pair.made).__name__
    remedy = f"{kind} must have the weights of {type(pair.layer).__name__}, of the same names and, for one rank, shapes"
    for path in sorted(ours.keys() - theirs.keys()):
        yield Problem(f"{name}/{path}", tuple(ours[path].shape), f"is not in the twin; {remedy}")
    for path in sorted(theirs.keys() - ours.keys()):
        yield Problem(f"{name}/{path}", tuple(theirs[path].shape), f"is in the twin alone; {remedy}")
    for path in sorted(ours.keys() & theirs.keys()):
        if tuple(ours[path].shape) != tuple(theirs[path].shape):
            got = tuple(theirs[path].shape)
            yield Problem(f"{name}/{path}", got, f"the layer's is {tuple(ours[path].shape)}; {remedy}")
    cuts = getattr(pair.made, "cuts", None)
    if not isinstance(cuts, Mapping):
        yield Problem(f"{name}.cuts", cuts, f"{kind} must say which dimension of each weight is cut")
        return
    for path, dimension in cuts.items():
        rank = len(theirs[path].shape) if path in theirs else 0
        if not 0 <= dimension < rank:
            yield Problem(
                f"{name}.cuts[{path!r}]", dimension, f"{kind} has no such dimension of such a weight"
            )


def _shared_with_whole(
    model: keras.Model, pairs: list[Pair], cuts: Mapping[int, Cut], of_twins: Counter[int]
) -> Iterator[Problem]:
    """Weights that are cut in one layer and used as they are by another."""
    inside = {
        id(inner) for pair in pairs for inner in pair.layer._flatten_layers(include_self=True, recursive=True)
    }
    others: dict[int, str] = {}
    for layer in model._flatten_layers(include_self=True, recursive=True):
        if id(layer) not in inside:
            inner = {id(weight) for _, each in _children(layer) for weight in each.weights}
            own = [id(weight) for weight in layer.weights if id(weight) not in inner]
            others |= {key: str(layer.path or layer.name) for key in own}
    for key, (_, name) in cuts.items():
        user = others.get(key) or (name if of_twins[key] > 1 else None)
        if user is not None:
            remedy = (
                "has a weight that another layer uses too; leave both whole with mpsdk_tf.set_tensor_parallelism(layer, "
                "False)"
            )
            yield Problem(name, user, remedy)


def _weights(layer: keras.layers.Layer) -> dict[str, keras.Variable]:
    weights = {id(weight) for weight in layer.weights}
    return {path: variable for path, variable in _variables(layer) if id(variable) in weights}


def _variables(layer: keras.layers.Layer, before: str = "") -> Iterator[tuple[str, keras.Variable]]:
    """All variables of a layer, by path: attributes that lead to the layer within that has it, then its own name.

    Not Keras' own paths: those count the layers of a kind that a process has made.
    """
    inner = list(_children(layer))
    theirs = {id(variable) for _, each in inner for variable in each.variables}
    seen: Counter[str] = Counter()
    for variable in layer.variables:
        if id(variable) not in theirs:
            seen[variable.name] += 1
            number = seen[variable.name]
            yield before + (variable.name if number == 1 else f"{variable.name}#{number}"), variable
    for name, each in inner:
        yield from _variables(each, f"{before}{name}/")


def _children(layer: keras.layers.Layer) -> Iterator[tuple[str, keras.layers.Layer]]:
    """The layers right within a layer, each once, by the attribute that has it; the leading underscore left out."""
    left = {id(each): each for each in layer._flatten_layers(include_self=False, recursive=False)}
    attributes = [(name, value) for name, value in vars(layer).items() if name != "_layers"]
    for name, value in sorted(attributes, key=lambda item: item[0].startswith("_")):
        several = isinstance(value, (list, tuple))
        for number, each in enumerate(value if several else (value,)):
            if left.pop(id(each), None) is not None:
                yield name.lstrip("_") + (f"/{number}" if several else ""), each
    yield from ((str(number), each) for number, each in enumerate(left.values()))


def _translated(made: keras.layers.Layer, twin: Twin) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        if twin.forward_hook is not None:
            args, kwargs = twin.forward_hook(*args, **kwargs)
        result = made(*args, **kwargs)
        return result if twin.return_hook is None else twin.return_hook(result)

    return call
