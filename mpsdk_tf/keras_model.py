"""A user's own Keras model, cut into segments that all of it goes through one after another.

A factory, called without arguments, gives a built model that maps ids (batch, length) to logits (batch, length,
vocabulary). A Sequential or functional model is cut at every tensor that alone leads from what is before it to what is
after it; segments are then joined where a cut would be wrong or useless:

- a mask passes there beside the tensor;
- segments share a weight (but for one of the first and the last segment, as in an embedding tied to the output);
- a segment has no matrix: norms and activations go with what follows.

Any other model is one segment: it can be sharded, and not cut into stages. Nothing is added to the model and nothing is
left out without a word: what the training would not do as the layers ask (losses, regularizers, constraints, state that a
forward updates) is refused. Segments are run under `keras.StatelessScope`: weights come in as arguments, and so do the
seeds of dropout, which are functions of where and when it happens.
"""

from __future__ import annotations

import hashlib
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from typing import cast

import keras
import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from mpsdk.backend import WEIGHT
from mpsdk.config import Precision
from mpsdk.description import Initial, ModelDescription, Part, TensorDescription
from mpsdk.errors import BackendError, ConfigError, Problem
from mpsdk.factory import Factory
from mpsdk.plan import Plan
from mpsdk_tf.comm import TensorGroup
from mpsdk_tf.keras_limits import problems_of
from mpsdk_tf.keras_segments import Ran, Segment, can_be_cut, last_of, run_through, segments_of
from mpsdk_tf.keras_twins import Cut, Refusal, cuts_of, draws_apart, put_in_place

_MATRIX = 2
_NOT_DECAYED = ("bias", "beta", "gamma", "scale")  # Keras' names for the weights of biases and norms
_POLICIES = {"fp32": "float32", "bf16": "mixed_bfloat16", "fp16": "mixed_float16"}

_making = threading.Lock()  # a seed is the process's, and ranks may be threads


@dataclass(frozen=True)
class KerasModel:
    """A model, the factory that made it, and the last dimension of its logits. See this module.

    Its weights are there until `let_go`; computing with segments does without.
    """

    model: keras.Model
    factory: Factory
    vocab_size: int

    stand_ins: dict[int, keras.Variable] = field(default_factory=dict[int, keras.Variable])
    """By the identity of a variable, that of the layer's parallel twin which is computed with."""

    @cached_property
    def _cuts(self) -> tuple[dict[int, Cut], tuple[Refusal, ...]]:
        with _making:
            return cuts_of(self.model, last_of(self.model))

    @cached_property
    def draws_apart(self) -> set[int]:
        """The states of random layers that draw others on each tensor-parallel rank, by identity."""
        return draws_apart(self.model) if self.stand_ins else set()

    @cached_property
    def segments(self) -> tuple[Segment, ...]:
        return tuple(segments_of(self.model, self.factory.sequence_length))

    @cached_property
    def names(self) -> dict[int, str]:
        """By a weight's identity, the name of its tensor: Keras' own path, numbered where several have the same."""
        seen: Counter[str] = Counter()
        names: dict[int, str] = {}
        for weight in self.model.weights:
            seen[weight.path] += 1
            number = seen[weight.path]
            names[id(weight)] = weight.path if number == 1 else f"{weight.path}#{number}"
        return names

    def numbers(self, blocks: tuple[int, int], *, first: bool, last: bool) -> range:
        """The segments of a stage. The first is the embedding part where there are two or more, the last the head where
        there are three or more; those between are blocks."""
        count, before = len(self.segments), int(len(self.segments) > 1)
        start, stop = (block + before for block in blocks)
        return range(0 if first else start, count if last else stop)

    def part_of(self, number: int) -> Part:
        count = len(self.segments)
        if number == 0 and count > 1:
            return "embedding"
        return "head" if number == count - 1 and count > 2 else "block"

    @cached_property
    def tied(self) -> dict[str, str]:
        """By name, the second name that a weight of the first segment has in the last."""
        if len(self.segments) == 1:
            return {}
        first = {id(weight) for weight in self.segments[0].weights}
        both = [self.names[id(weight)] for weight in self.segments[-1].weights if id(weight) in first]
        return {name: f"head/{name}" for name in both}

    def description(self) -> ModelDescription:
        """What `resolve` needs to know. The vocabulary is the logits' last dimension."""
        parts: dict[Part, list[tuple[TensorDescription, ...]]] = {"embedding": [], "block": [], "head": []}
        for number in range(len(self.segments)):
            parts[self.part_of(number)].append(tuple(self._tensors(number, len(parts["block"]))))
        blocks = {f"block {number}": tensors for number, tensors in enumerate(parts["block"])}
        length = self._input_shape[1] if self._input_shape else None
        return ModelDescription(
            name=self.model.name,
            naming="module",
            factory=self.factory.name,
            uncut=tuple((each.layer, each.got, each.reason) for each in self._cuts[1]),
            max_positions=length,
            vocab_size=self.vocab_size,
            embedding=parts["embedding"][0] if parts["embedding"] else (),
            kinds=blocks,
            blocks=tuple(blocks),
            head=parts["head"][0] if parts["head"] else (),
        )

    def _tensors(self, number: int, block: int) -> list[TensorDescription]:
        part = self.part_of(number)
        trainable = {id(weight) for weight in self.model.trainable_variables}
        tensors: list[TensorDescription] = []
        for weight in self.segments[number].weights:
            name = self.names[id(weight)]
            again = name in self.tied and number > 0
            cut = self._cuts[0].get(id(weight))
            tensor = TensorDescription(
                name=self.tied[name] if again else name,
                shape=shape_of(weight),
                role="replicated" if cut is None else "part",
                dimension=None if cut is None else cut.dimension,
                units=None if cut is None else weight.shape[cut.dimension],
                unit=None if cut is None else f"size of dimension {cut.dimension} of {name}",
                part=part,
                block=block if part == "block" else None,
                decay=len(weight.shape) >= _MATRIX and weight.path.rpartition("/")[2] not in _NOT_DECAYED,
                trainable=id(weight) in trainable,
                initial=Initial(kind="given"),
                tied_to=name if again else None,
            )
            tensors.append(tensor)
        return tensors

    @property
    def _input_shape(self) -> tuple[int | None, ...] | None:
        return tuple(self.model.inputs[0].shape) if can_be_cut(self.model) else None

    def travelling(self, plan: Plan) -> list[tf.TensorSpec]:
        """What each stage but the last passes on. Weights must be there."""
        stages = plan.stages
        if len(stages) == 1:
            return []
        parts = [segment.run for segment in self.segments]
        results = run_through(parts, self.model, plan.microbatch_size, plan.training.sequence_length).results
        last = [self.numbers(blocks, first=False, last=False)[-1] for blocks in stages[:-1]]
        return [results[number] for number in last]

    # -- weights ----------------------------------------------------------------------------------------------------

    @cached_property
    def digest(self) -> str:
        """Of all first values: ranks compare theirs."""
        found = hashlib.blake2b(digest_size=8)
        for weight in self.model.weights:
            found.update(np.ascontiguousarray(weight.numpy()).tobytes())
        return found.hexdigest()

    def let_go(self) -> None:
        """Free the weights: a rank keeps its own share elsewhere."""
        for weight in self.model.weights:
            weight._value = None  # what Keras itself has for a variable that is not there yet


@dataclass(frozen=True)
class FirstValues:
    """A TensorSource of the weights that the factory has given."""

    made: KerasModel
    slots: frozenset[str] = frozenset({WEIGHT})

    @property
    def scalars(self) -> dict[str, float | int]:
        return {}

    def read(
        self, name: str, slot: str, offset: tuple[int, ...], shape: tuple[int, ...]
    ) -> NDArray[np.float32]:
        place = tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))
        weight = self._weights[name]
        return tf.reshape(weight.value, shape_of(weight))[place].numpy()

    @cached_property
    def _weights(self) -> dict[str, keras.Variable]:
        return {self.made.names[id(weight)]: weight for weight in self.made.model.weights}


def shape_of(weight: keras.Variable) -> tuple[int, ...]:
    """Of its tensor: a number is a tensor of one element, so that it has a dimension to be cut in."""
    return tuple(weight.shape) or (1,)


def make(factory: Factory, *, seed: int, precision: Precision, device: str) -> KerasModel:
    """The factory's model on `device`, its initial weights drawn under `seed`.

    It is called on a thread of its own, where Keras has given no names yet: they are the same in every process.

    Raises:
        ConfigError: the factory fails, or makes a model that can't be trained: all reasons in one error.
    """
    call = factory.load()

    def work() -> object:
        keras.utils.set_random_seed(seed)
        keras.config.set_dtype_policy(_POLICIES[precision.mode])
        with tf.device(device):
            return call()

    try:
        with _making, ThreadPoolExecutor(1) as thread:
            model = thread.submit(work).result()
    except Exception as error:  # whatever the user's function raises
        remedy = f"calling it failed: {type(error).__name__}: {error}"
        raise ConfigError([Problem("model", factory.name, remedy)], where="the model") from error
    if problems := problems_of(model):
        raise ConfigError([Problem("model", factory.name, each) for each in problems], where="the model")
    made = cast("keras.Model", model)
    ran = _run_whole(made, factory)
    vocab_size = int(ran.results[0].shape[-1] or 0)
    return KerasModel(made, factory, vocab_size)


def make_for(plan: Plan, device: str, group: TensorGroup) -> KerasModel:
    """The model of `plan`, its layers in their parallel twins' hands where `group` is more than one rank.

    Raises:
        BackendError: it is not the model that was planned.
        ConfigError: its layers don't fit together as they are cut.
    """
    description = plan.description
    assert description.factory is not None
    factory = Factory(description.factory, "", plan.training.sequence_length)
    made = make(factory, seed=plan.training.seed, precision=plan.distribution.precision, device=device)
    now, planned = list(made.description().tensors()), list(description.tensors())
    if now != planned:
        raise BackendError(
            f"{factory.name} makes another model here than the one that was planned: it has {len(now)} tensors, planned were "
            f"{len(planned)}, or they have other names or shapes. It must make the same model whenever it is called"
        )
    if group.handle is not None:
        assert made.segments  # found in the model as its user made it
        with _making:
            made.stand_ins.update(put_in_place(made.model, last_of(made.model), group, made._cuts[0]))
        _refuse_replaced(_run_whole(made.model, factory), made)
    return made


def _refuse_replaced(ran: Ran, made: KerasModel) -> None:
    """Raises ConfigError where a layer computes with the weight of another one, which is cut."""
    read = {id(variable) for variable in ran.read}
    names = [
        made.names[id(weight)]
        for weight in made.model.weights
        if id(weight) in made.stand_ins and id(weight.value) in read
    ]
    if names:
        remedy = (
            "is read by another layer than the one that has it, which is cut; leave that one whole with "
            "mpsdk_tf.set_tensor_parallelism(layer, False)"
        )
        raise ConfigError([Problem(name, "cut", remedy) for name in names], where="the model")


def _run_whole(model: keras.Model, factory: Factory) -> Ran:
    """What a symbolic call of a model shows, which computes nothing. Raises ConfigError for what can't be trained."""
    length, weights = factory.sequence_length, {id(weight) for weight in model.weights}
    try:
        ran = run_through([lambda ids, training: model(ids, training=training)], model, 2, length)
    except Exception as error:  # whatever the layers raise
        reason = next((line for line in str(error).splitlines() if line.strip()), "")
        remedy = f"calling the model on ids of shape (2, {length}) failed: {type(error).__name__}: {reason}"
        raise ConfigError([Problem("model", factory.name, remedy)], where="the model") from error
    result, problems = ran.results[0], list[str]()
    if len(model.weights) != len(weights):
        problems.append("makes weights when it is called; call it once in the factory, before giving it back")
    if result.shape.rank != 3 or result.shape[:2] != (2, length) or not result.dtype.is_floating:
        problems.append(
            f"gives {result.dtype.name} of shape {tuple(result.shape)} for ids of shape (2, {length}); it must give logits of "
            f"shape (2, {length}, vocabulary)"
        )
    if ran.losses:
        problems.append("has layers that add losses of their own, which would be left out; remove add_loss")
    if updated := sorted({weight.path.rpartition("/")[0] for weight in ran.updated if id(weight) in weights}):
        problems.append(
            f"layers update state in their forward, which no layout could keep alike on all ranks: {', '.join(updated)}; use "
            "LayerNormalization in place of BatchNormalization, or freeze the layer (trainable = False)"
        )
    if problems:
        raise ConfigError([Problem("model", factory.name, each) for each in problems], where="the model")
    return ran
