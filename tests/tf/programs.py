"""What a rank's program of a step consists of, counted where it is written: nothing runs, and no other rank is needed.

What TensorFlow runs of a program is what stands in it: collectives have effects, so none is ever left out or made twice.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import tensorflow as tf

from mpsdk.backend import Place
from mpsdk.plan import Plan
from mpsdk_tf.backend import TensorFlowBackend
from tests.estimated import Sent

# The call that a reduce-scatter is on a CPU, an all-to-all of the whole payload, is used for nothing else.
COLLECTIVES = {
    "CollectiveReduceV2": "all-reduce",
    "CollectiveGatherV2": "all-gather",
    "CollectiveAllToAllV2": "reduce-scatter",
    "CollectiveBcastSendV2": "send",
}
LOOPS = ("While", "StatelessWhile")


class Program(NamedTuple):
    """What a program sends, and the FLOPs of the matrix products of its linear layers."""

    sent: Sent
    matrix_flops: int


@contextmanager
def built(plan: Plan, rank: int) -> Iterator[TensorFlowBackend]:
    """A backend of `rank` alone."""
    backend = TensorFlowBackend(threads=True)
    place = Place(rank=rank, local_rank=rank, world_size=plan.world_size, store="counted", timeout=60.0)
    try:
        backend.build(plan, place)
        yield backend
    finally:
        backend.close()


def trace_step(backend: TensorFlowBackend) -> Any:
    """The training program, as a concrete function."""
    return _trace(backend, backend._ready.trainer.train_program)


def count(backend: TensorFlowBackend, plan: Plan) -> tuple[Program, Program]:
    """The programs of a step and of its report."""
    step, report = trace_step(backend), _trace(backend, backend._ready.trainer._report_program)
    members = _members(backend, plan)
    return _count(step.graph, members, plan.training.accumulation), _count(report.graph, members, 1)


def _trace(backend: TensorFlowBackend, program: Any) -> Any:
    with tf.device(backend._ready.groups.device):
        return program.get_concrete_function()


def _count(graph: Any, members: dict[int, tuple[int, ...]], passes: int) -> Program:
    sent: Sent = Counter()
    flops = 0
    for operation, times in _operations(graph, passes):
        if operation.type in COLLECTIVES:
            payload, size, key = operation.inputs[:3]
            name, ranks = COLLECTIVES[operation.type], members[int(tf.get_static_value(key))]
            assert int(tf.get_static_value(size)) == (2 if name == "send" else len(ranks))
            sent[name, ranks, _bytes(payload)] += times
        elif operation.type.startswith("Collective"):
            assert operation.type == "CollectiveBcastRecvV2", f"{operation.type} is not counted"
        elif operation.type == "MatMul":
            first, product = operation.inputs[0].shape, operation.outputs[0].shape
            inner = first[0 if operation.get_attr("transpose_a") else 1]
            flops += times * 2 * product.num_elements() * inner
    return Program(sent, flops)


def _operations(graph: Any, passes: int) -> Iterator[tuple[Any, int]]:
    """The operations that `graph` runs, in functions that it calls too, and how often.

    A loop goes over the passes of a step: there is no other.
    """
    for operation in graph.get_operations():
        yield operation, 1
        times = passes if operation.type in LOOPS else 1
        for name in _called(operation):
            for inner, count in _operations(graph._get_function(name).graph, passes):
                assert operation.type not in LOOPS or inner.type not in LOOPS
                yield inner, times * count


def _called(operation: Any) -> list[str]:
    if operation.type in LOOPS:
        return [operation.get_attr("body").name]
    if operation.type in ("If", "StatelessIf"):
        return [operation.get_attr("then_branch").name, operation.get_attr("else_branch").name]
    if operation.type in ("PartitionedCall", "StatefulPartitionedCall"):
        if "_XlaMustCompile" in operation.node_def.attr:  # a program of XLA communicates nothing
            return []
        return [operation.get_attr("f").name]
    return []


def _members(backend: TensorFlowBackend, plan: Plan) -> dict[int, tuple[int, ...]]:
    """The ranks of every group by its key; of a link between two stages, those of its whole pipeline."""
    groups, trainer = backend._ready.groups, backend._ready.trainer
    found = (groups.tensor.handle, groups.data, groups.shards, groups.replicas, groups.model, groups.tied)
    members = {group.key: group.ranks for group in (*found, groups.world) if group is not None}
    if groups.links is not None:
        line = plan.topology.group(trainer.place.rank, ("pp",))
        members |= {link.key: line for link in groups.links._links.values()}
    return members


def _bytes(tensor: tf.Tensor) -> int:
    elements = tensor.shape.num_elements()
    assert elements is not None, tensor
    return elements * tensor.dtype.size
