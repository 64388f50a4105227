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
from mpsdk_tf.register import Mark, mark_of, twin_of
from mpsdk_tf.twins import ParallelTwin, Twin, making_for

_WHOLE = "leave the layer whole with mpsdk_tf.set_tensor_parallelism(layer, False)"


class Cut(NamedTuple):
    """Which dimension of a weight is cut, and of which layer it is, for messages."""

    dimension: int
    layer: str


class Pair(NamedTuple):
    """A layer and its twin, made at the size of a group."""

    layer: keras.layers.Layer
    made: keras.layers.Layer
    twin: Twin


class Refusal(NamedTuple):
    """A layer that is to be cut and can't be: its path, what was found, and why."""

    layer: str
    got: str
    reason: str


def cuts_of(model: keras.Model, end: Any) -> tuple[dict[int, Cut], tuple[Refusal, ...]]:
    """By a weight's identity, how it is cut; and every layer that is to be cut and whose twin can't be made, or has other
    weights. `end`: the operation that gives the model's output."""
    refusals: list[Refusal] = []
    pairs = _pairs(model, end, TensorGroup(), refusals)
    cuts: dict[int, Cut] = {}
    for pair in pairs:
        found = list(_other_weights(pair))
        refusals += found
        weights = _weights(pair.layer)
        for path, dimension in () if found else cast("ParallelTwin", pair.made).cuts.items():
            cuts[id(weights[path])] = Cut(dimension, _name(pair.layer))
    refusals += _shared(model, pairs)
    return cuts, tuple(refusals)


def put_in_place(
    model: keras.Model, end: Any, group: TensorGroup, cuts: Mapping[int, Cut]
) -> dict[int, keras.Variable]:
    """Have the layers of `model` compute as their twins of `group` do. Gives, by the identity of a layer's variable (a weight,
    or the state of a random layer), the twin's, which has no value of its own.

    Raises ConfigError for a twin whose weights are not the parts that the plan has of them.
    """
    refusals: list[Refusal] = []
    pairs = _pairs(model, end, group, refusals)
    for pair in pairs:
        refusals += _other_parts(pair, group.size, cuts)
    if refusals:
        raise ConfigError([Problem(*each) for each in refusals], where="tensor parallelism of the model")
    variables: dict[int, keras.Variable] = {}
    for layer, made, twin in pairs:
        theirs = dict(_variables(made))
        for path, variable in _variables(layer):
            if path in theirs:
                variables[id(variable)] = theirs[path]
        layer.__dict__["call"] = _translated(made, twin)
        layer.input_spec = None  # it may be given a part; the twin looks for itself
    return variables


def draws_apart(model: keras.Model) -> set[int]:
    """The states of random layers within twins that draw others on each rank, as the twins say in `draws_apart`."""
    found: set[int] = set()
    for layer, twin in _to_cut(model):
        apart = getattr(twin.dist_module, "draws_apart", ())
        for path, variable in _variables(layer):
            if path.startswith(tuple(f"{name}/" for name in apart)):
                found.add(id(variable))
    return found


def _pairs(model: keras.Model, end: Any, group: TensorGroup, refusals: list[Refusal]) -> list[Pair]:
    """Their weights have shapes and no values; they compute in the dtypes of the layers that they stand for."""
    pairs: list[Pair] = []
    policy = keras.config.dtype_policy()
    with making_for(group), keras.StatelessScope(initialize_variables=False):
        for layer, twin in _to_cut(model):
            try:
                keras.config.set_dtype_policy(layer.dtype_policy)
                arguments = _arguments(layer, twin, ends=layer is end)
                if arguments is None:
                    continue
                made = twin.dist_module(*arguments[0], **arguments[1])
                if not made.built:
                    made.build_from_config(layer.get_build_config() or {})
            except Exception as error:  # whatever the twin raises
                reason = f"its twin {twin.dist_module.__name__} can't be made: {type(error).__name__}: {error}; {_WHOLE}"
                refusals.append(Refusal(_name(layer), type(layer).__name__, reason))
                continue
            finally:
                keras.config.set_dtype_policy(policy)
            pairs.append(Pair(layer, made, twin))
    return pairs


def _name(layer: keras.layers.Layer) -> str:
    return str(layer.path or layer.name)


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
    """The outermost layers with a twin that are to be cut, each once. What a mark says holds for layers within that were made
    later."""
    marks = [mark_of(layer) for layer in model._flatten_layers(include_self=True, recursive=True)]
    otherwise = not any(mark is not None and mark.enabled for mark in marks)
    found: dict[int, tuple[keras.layers.Layer, Twin]] = {}

    def look(layer: keras.layers.Layer, outer: Mark | None) -> None:
        mark, twin = mark_of(layer) or outer, twin_of(layer)
        if twin is not None and (otherwise if mark is None else mark.enabled):
            found[id(layer)] = (layer, twin)
            return
        for inner in layer._flatten_layers(include_self=False, recursive=False):
            look(inner, mark)

    look(model, None)
    return list(found.values())


def _other_weights(pair: Pair) -> Iterator[Refusal]:
    """What differs between a layer's weights and those of its twin for one rank."""
    ours, theirs = _weights(pair.layer), _weights(pair.made)
    name, kind = _name(pair.layer), type(pair.made).__name__
    if ours and not theirs:
        reason = (
            f"its twin {kind} has no weights; give it a method build, or have it make them when it is made"
        )
        yield Refusal(name, type(pair.layer).__name__, reason)
        return
    remedy = f"{kind} must have the weights of {type(pair.layer).__name__}, of the same names and, for one rank, shapes"
    for path in sorted(ours.keys() - theirs.keys()):
        yield Refusal(f"{name}/{path}", _shape(ours[path]), f"is not in the twin; {remedy}")
    for path in sorted(theirs.keys() - ours.keys()):
        yield Refusal(f"{name}/{path}", _shape(theirs[path]), f"is in the twin alone; {remedy}")
    for path in sorted(ours.keys() & theirs.keys()):
        if ours[path].shape != theirs[path].shape:
            yield Refusal(
                f"{name}/{path}", _shape(theirs[path]), f"the layer's is {_shape(ours[path])}; {remedy}"
            )
    cuts = getattr(pair.made, "cuts", None)
    if not isinstance(cuts, Mapping):
        yield Refusal(f"{name}.cuts", repr(cuts), f"{kind} must say which dimension of each weight is cut")
        return
    for path, dimension in cuts.items():
        rank = len(theirs[path].shape) if path in theirs else 0
        if not 0 <= dimension < rank:
            yield Refusal(
                f"{name}.cuts[{path!r}]", repr(dimension), f"{kind} has no such dimension of such a weight"
            )


def _other_parts(pair: Pair, size: int, cuts: Mapping[int, Cut]) -> Iterator[Refusal]:
    """Weights of a twin for several ranks that are not the parts which it said."""
    theirs = _weights(pair.made)
    for path, weight in _weights(pair.layer).items():
        part, cut = list(weight.shape), cuts.get(id(weight))
        if cut is not None:
            part[cut.dimension] //= size
        if path not in theirs or list(theirs[path].shape) != part:
            got = _shape(theirs[path]) if path in theirs else "nothing"
            reason = (
                f"for {size} ranks {type(pair.made).__name__} must have {tuple(part)}, as its cuts say; the layer's is "
                f"{_shape(weight)}"
            )
            yield Refusal(f"{_name(pair.layer)}/{path}", got, reason)


def _shape(weight: keras.Variable) -> str:
    return str(tuple(weight.shape))


def _shared(model: keras.Model, pairs: list[Pair]) -> Iterator[Refusal]:
    """Layers with a twin one of whose weights another layer has too."""
    inside = {
        id(inner): pair.layer
        for pair in pairs
        for inner in pair.layer._flatten_layers(include_self=True, recursive=True)
    }
    users: dict[int, dict[int, keras.layers.Layer]] = {}
    for layer in model._flatten_layers(include_self=True, recursive=True):
        within = {id(weight) for _, each in _children(layer) for weight in each.weights}
        for weight in layer.weights:
            if id(weight) not in within:
                user = inside.get(id(layer), layer)
                users.setdefault(id(weight), {})[id(user)] = user
    cut = {id(pair.layer) for pair in pairs}
    told: set[int] = set()
    for several in users.values():
        for key, layer in several.items():
            if len(several) > 1 and key in cut and key not in told:
                told.add(key)
                others = ", ".join(_name(other) for number, other in several.items() if number != key)
                reason = f"has a weight that another layer uses too; {_WHOLE}, both"
                yield Refusal(_name(layer), others, reason)


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
