"""A piece of the model as graphs: a forward, and a backward that says what it needs of it.

A piece (an embedding, a block, a head with its loss) is traced once, with its gradient. That gives two graphs: of the
forward F, and of the backward B, which reads tensors of F. What runs is cut out of them:

- the forward gives its result and the tensors of F that are *kept*, and no more;
- the backward first computes again what B reads of F and was not kept, from what was kept, as far as it needs to;
- a backward can be split (Qi et al. 2024, arXiv:2401.10241): what the gradient of the input depends on, with all
  communication, runs first, and the weight gradients, on which nothing else depends, later. Nothing is computed twice;
- weights are arguments, of the backward again: what was let go after the forward may be gathered anew.

So activation checkpointing, the level of sharding and zero-bubble schedules are all choices of where to cut, and hold for
every layer that TensorFlow can differentiate. Pieces are functions that are called, not copied, in the program of a step:
it stays small however many microbatches there are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import tensorflow as tf

from mpsdk.errors import BackendError
from mpsdk_tf.tensor import Tensor

Call = Callable[[list[Tensor], Tensor, list[Tensor]], Tensor]
"""Parameters, input, and whatever else (labels, seeds), to the result."""

Keep = Callable[[Any], bool]
"""Whether the result of an operation of F is kept for the backward."""

_MATRIX = 2  # weights of this rank and above have the gradients that are worth putting off
_SAME_BUFFER = ("Identity", "Reshape")  # operations whose result is their input's memory


class Gradients(NamedTuple):
    """Of the input (None where it has none) and of each parameter; None where that comes later."""

    hidden: Tensor | None
    parameters: list[Tensor | None]


@dataclass
class Saved:
    """What is left of a forward for its backward. `hidden`: the number of the input among `inputs`. `deferred`: what
    is left of a split backward for its second part."""

    inputs: list[Tensor]
    hidden: int
    kept: list[Tensor]
    deferred: list[Tensor] = field(default_factory=list)

    def move_input(self, device: str) -> None:
        """Have the forward's input wait on `device`."""
        with tf.device(device):
            self.inputs[self.hidden] = tf.identity(self.inputs[self.hidden])


class Piece:
    """See this module.

    Args:
        keep: what a forward keeps for its backward; None: everything that the backward reads.
        compiled: whether its functions are compiled by XLA. They must not communicate then.
        split: whether weight gradients are given apart, by `backward_weights`.
    """

    def __init__(
        self, name: str, call: Call, *, keep: Keep | None = None, compiled: bool = False, split: bool = False
    ) -> None:
        self.name, self.compiled, self.split = name, compiled, split
        self.call, self.keep = call, keep
        self._traced: _Traced | None = None

    def forward(
        self, parameters: Sequence[Tensor], hidden: Tensor, extras: Sequence[Tensor]
    ) -> tuple[Tensor, Saved]:
        traced = self._trace(parameters, hidden, extras)
        inputs = [*parameters, hidden, *extras, *traced.constants]
        output, *kept = traced.forward(*inputs)
        return output, Saved(inputs, traced.parameters, kept)

    def backward(self, saved: Saved, parameters: Sequence[Tensor] | None, gradient: Tensor) -> Gradients:
        """`parameters`: the weights again, where the backward reads any (`reads_parameters`)."""
        traced = self._ready
        if parameters is not None:
            saved.inputs[: len(parameters)] = parameters
        inputs = [saved.inputs[index] for index in traced.read_inputs]
        results = traced.backward(gradient, *inputs, *saved.kept)
        gradients, saved.deferred = results[: len(traced.now)], list(results[len(traced.now) :])
        return traced.arrange(dict(zip(traced.now, gradients, strict=True)))

    def backward_weights(self, saved: Saved) -> Gradients:
        """The second part of a split backward."""
        traced = self._ready
        return traced.arrange(dict(zip(traced.later, traced.weights(*saved.deferred), strict=True)))

    @property
    def backwards(self) -> int:
        """Into how many parts the backward is split."""
        return 2 if self._ready.later else 1

    @property
    def reads_parameters(self) -> bool:
        """Whether the backward reads any weight."""
        return any(index < self._ready.parameters for index in self._ready.read_inputs)

    @property
    def kept(self) -> list[tf.TensorSpec]:
        """What a forward keeps beside its inputs."""
        return [tf.TensorSpec(tensor.shape, tensor.dtype, tensor.op.name) for tensor in self._ready.kept]

    @property
    def _ready(self) -> _Traced:
        assert self._traced is not None, f"piece {self.name} has not run forward yet"
        return self._traced

    def _trace(self, parameters: Sequence[Tensor], hidden: Tensor, extras: Sequence[Tensor]) -> _Traced:
        if self._traced is None:
            self._traced = _Traced(self, parameters, hidden, extras)
        return self._traced

    def function(self, body: Callable[..., list[Tensor]], *inputs: Tensor) -> Any:
        """`body` as a function that is called as it is, and never copied into the program that calls it."""
        made = tf.function(
            body,
            autograph=False,
            jit_compile=True if self.compiled else None,
            experimental_attributes={"_noinline": True},
        )
        return made.get_concrete_function(*(tf.TensorSpec(tensor.shape, tensor.dtype) for tensor in inputs))


class _Traced:
    """The graphs of a piece for the shapes that it is used with."""

    def __init__(
        self, piece: Piece, parameters: Sequence[Tensor], hidden: Tensor, extras: Sequence[Tensor]
    ) -> None:
        self.piece, self.parameters = piece, len(parameters)
        sources = [*range(self.parameters)] + ([self.parameters] if hidden.dtype.is_floating else [])
        specs = [tf.TensorSpec(each.shape, each.dtype) for each in (*parameters, hidden, *extras)]
        self._forward, self._backward, self._output = _differentiate(
            piece.call, specs, self.parameters, sources
        )
        self.constants: list[Tensor] = list(self._forward.captured_inputs)  # that layers hold as tensors
        if any(constant.dtype == tf.resource for constant in self.constants):
            raise BackendError(
                f"{piece.name} reads a variable that is not a weight of its layers; make it one, and give random operations a "
                "keras.random.SeedGenerator of the layer"
            )
        self._inputs: list[Tensor] = list(self._forward.inputs)
        self._gradients: list[Tensor] = list(self._backward.structured_outputs)
        given = {tensor.ref(): index for index, tensor in enumerate(self._inputs)}
        captures = list(zip(self._backward.inputs[1:], self._backward.captured_inputs, strict=True))
        self._reads = {inner.name: outer for inner, outer in captures if outer.ref() not in given}
        direct = {inner.name: given[outer.ref()] for inner, outer in captures if outer.ref() in given}

        self.kept: list[Tensor] = []
        used = self._walk(piece.keep)
        self.read_inputs = sorted(used | set(direct.values()))
        position = {index: place for place, index in enumerate(self.read_inputs)}
        self._direct = {name: position[index] for name, index in direct.items()}
        self._again = {self._inputs[index].name: place for index, place in position.items()}

        names = [gradient.name for gradient in self._gradients]
        apart = [
            place
            for place, source in enumerate(sources)
            if piece.split and source < self.parameters and parameters[source].shape.rank >= _MATRIX
        ]
        now, later, boundary = _split(self._backward.graph, names, apart)
        self.now, self.later = [sources[place] for place in now], [sources[place] for place in later]
        self._make_forward()
        self._make_backward([names[place] for place in now], boundary)
        if later:
            self._make_weights([names[place] for place in later], boundary)

    def _walk(self, keep: Keep | None) -> set[int]:
        """Find what to keep: from every tensor that B reads back through F, up to an input or to what is kept.

        Gives the inputs that are met. What depends on no weight or hidden state (masks of ids, rows of seeds) is never
        kept, and neither is what another tensor's buffer holds already.
        """
        inputs = {tensor.ref(): index for index, tensor in enumerate(self._inputs)}
        varies = _varying(self._forward.graph, [each for each in self._inputs if each.dtype.is_floating])
        met: set[int] = set()
        seen: set[Any] = set()
        waiting = list(self._reads.values())
        while waiting:
            tensor = waiting.pop(0)
            if tensor.ref() in seen:
                continue
            seen.add(tensor.ref())
            kept = tensor.op.type not in _SAME_BUFFER if keep is None else keep(tensor.op)
            if tensor.ref() in inputs:
                met.add(inputs[tensor.ref()])
            elif kept and varies[tensor.op.name]:
                self.kept.append(tensor)
            else:
                waiting.extend(tensor.op.inputs)
        return met

    def _make_forward(self) -> None:
        wanted = [self._output.name, *(tensor.name for tensor in self.kept)]
        graph = self._forward.graph

        def forward(*inputs: Tensor) -> list[Tensor]:
            given = {tensor.name: value for tensor, value in zip(self._inputs, inputs, strict=True)}
            return _copy(graph, wanted, given)

        self.forward = self.piece.function(forward, *self._inputs)

    def _make_backward(self, wanted: list[str], boundary: list[str]) -> None:
        gradient = self._backward.inputs[0]

        def backward(gradient_value: Tensor, *values: Tensor) -> list[Tensor]:
            given = {name: values[place] for name, place in self._again.items()}
            kept = values[len(self.read_inputs) :]
            given |= {tensor.name: value for tensor, value in zip(self.kept, kept, strict=True)}
            missing = {name: tensor.name for name, tensor in self._reads.items()}
            made = _copy(self._forward.graph, list(missing.values()), given)
            reads = dict(zip(missing, made, strict=True))
            reads |= {name: values[place] for name, place in self._direct.items()}
            reads[gradient.name] = gradient_value
            return _copy(self._backward.graph, [*wanted, *boundary], reads)

        arguments = [self._inputs[index] for index in self.read_inputs]
        self.backward = self.piece.function(backward, gradient, *arguments, *self.kept)

    def _make_weights(self, wanted: list[str], boundary: list[str]) -> None:
        graph = self._backward.graph

        def weights(*values: Tensor) -> list[Tensor]:
            return _copy(graph, wanted, dict(zip(boundary, values, strict=True)))

        self.weights = self.piece.function(weights, *(graph.get_tensor_by_name(name) for name in boundary))

    def arrange(self, found: dict[int, Tensor]) -> Gradients:
        """Gradients by the number of their input, as `Gradients`."""
        return Gradients(found.get(self.parameters), [found.get(index) for index in range(self.parameters)])


def _differentiate(
    call: Call, specs: Sequence[tf.TensorSpec], parameters: int, sources: Sequence[int]
) -> tuple[Any, Any, Tensor]:
    """F, B, and the tensor of F that is its result.

    B is a function within F, so that it captures what it reads of F.

    Args:
        specs: of the inputs, the first `parameters` of them weights.
        sources: the numbers of those to differentiate by.
    """
    found: list[Any] = []

    def forward(*inputs: Tensor) -> Tensor:
        differentiated = [inputs[source] for source in sources]
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(differentiated)
            output = call(list(inputs[:parameters]), inputs[parameters], list(inputs[parameters + 1 :]))

        def backward(gradient: Tensor) -> list[Tensor]:
            gradients: Any = tape.gradient(
                output, differentiated, gradient, unconnected_gradients=tf.UnconnectedGradients.ZERO
            )
            return [tf.identity(tf.convert_to_tensor(each)) for each in gradients]

        traced = tf.function(backward, autograph=False)
        found.extend((traced.get_concrete_function(tf.TensorSpec(output.shape, output.dtype)), output))
        return output

    traced = tf.function(forward, autograph=False).get_concrete_function(*specs)
    return traced, *found


def _copy(graph: tf.Graph, wanted: Sequence[str], given: dict[str, Tensor]) -> list[Tensor]:
    """Copy what `wanted` needs of `graph` into the present one, with `given` in place of the tensors of these names."""
    definition = graph.as_graph_def()
    nodes = {node.name: node for node in definition.node}
    needed: set[str] = set()
    used: set[str] = set()
    waiting = [name for name in wanted if name not in given]
    while waiting:
        name = _full(waiting.pop())
        if name in given:
            used.add(name)
            continue
        owner = name.partition(":")[0]
        if owner not in needed:
            needed.add(owner)
            waiting.extend(each for each in nodes[owner].input if not each.startswith("^"))
    part = tf.compat.v1.GraphDef(versions=definition.versions, library=definition.library)
    for node in definition.node:
        if node.name in needed:
            part.node.add().CopyFrom(node)
            data = [each for each in node.input if not each.startswith("^")]
            del part.node[-1].input[:]
            part.node[-1].input.extend(data)
            part.node[-1].attr.pop("_class", None)  # to stand beside an operation that may not be copied
    missing = [name for name in wanted if name not in given]
    made: list[Tensor] = []
    if missing:
        mapped = {name: given[name] for name in used}
        made = list(tf.graph_util.import_graph_def(part, input_map=mapped, return_elements=missing, name=""))
    found = dict(zip(missing, made, strict=True))
    return [given[name] if name in given else found[name] for name in wanted]


def _full(name: str) -> str:
    """A tensor's name with its output number, which definitions of graphs leave out for the first."""
    return name if ":" in name else f"{name}:0"


def _varying(graph: tf.Graph, inputs: Iterable[Tensor]) -> dict[str, bool]:
    """For each operation, whether it depends on one of `inputs`."""
    given = {tensor.op.name for tensor in inputs}
    varies: dict[str, bool] = {}
    for operation in graph.get_operations():
        varies[operation.name] = operation.name in given or any(
            varies[tensor.op.name] for tensor in operation.inputs
        )
    return varies


def _split(graph: tf.Graph, gradients: list[str], apart: list[int]) -> tuple[list[int], list[int], list[str]]:
    """Cut a backward in two.

    Args:
        gradients: the tensors that it gives.
        apart: places of those that are wanted later.

    Returns:
        The places of what comes first, of what comes later, and the tensors between the two parts.
    """
    now = [place for place in range(len(gradients)) if place not in apart]
    if not apart:
        return now, [], []
    early = _ancestors(graph, [gradients[place] for place in now])
    communicating = [op.outputs[0].name for op in graph.get_operations() if op.type.startswith("Collective")]
    early |= _ancestors(graph, communicating)
    late = _ancestors(graph, [gradients[place] for place in apart]) - early
    late = {name for name in late if graph.get_operation_by_name(name).type != "Placeholder"}
    boundary: dict[str, None] = {}
    for place in apart:  # what is there already is passed through
        if gradients[place].partition(":")[0] not in late:
            boundary[gradients[place]] = None
    for operation in graph.get_operations():
        if operation.name in late:
            boundary |= {tensor.name: None for tensor in operation.inputs if tensor.op.name not in late}
    return now, apart, list(boundary)


def _ancestors(graph: tf.Graph, names: Iterable[str]) -> set[str]:
    found: set[str] = set()
    waiting = [graph.get_tensor_by_name(name).op for name in names]
    while waiting:
        operation = waiting.pop()
        if operation.name not in found:
            found.add(operation.name)
            waiting.extend(tensor.op for tensor in operation.inputs)
    return found
