"""Collectives with gradients for tensor parallelism, point-to-point calls for the pipeline, and the cluster under them.

The conjugate pairs are those of Megatron-LM (Shoeybi et al. 2019, arXiv:1909.08053, figure 3) and of its sequence
parallelism (Korthikanti et al. 2022, arXiv:2205.05198, figure 5): each forward's collective has the other as backward.

| function                                 | forward                      | backward                     |
|------------------------------------------|------------------------------|------------------------------|
| `enter_parallel`                         | identity                     | all-reduce                   |
| `leave_parallel`                         | all-reduce                   | identity                     |
| `enter_parallel`, under sequence parallel | all-gather, dimension 1     | reduce-scatter, dimension 1  |
| `leave_parallel`, under sequence parallel | reduce-scatter, dimension 1 | all-gather, dimension 1      |

The calls are TensorFlow's raw collective operations, which a group of ranks finds each other in by two numbers: the group's
key, and an instance key, which stands for one place in the program and for one shape. Both follow from the plan and from the
order in which a program is traced, equal on all ranks of a group. Collectives of one rank run in program order
(TensorFlow's automatic control dependencies see to it); sends and receives do not, and are ordered by the executor.

Only this module and `mpsdk_tf.xplane` use symbols of TensorFlow that are not public: `tensorflow.python.eager.context` sets
the cluster up and watches over it. TensorFlow has no public way to do either for more than its own strategies.
"""

from __future__ import annotations

import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from typing import Any, Literal

import tensorflow as tf
from tensorflow.python.eager import context  # see above

from mpsdk_tf.tensor import Tensor

_LEADER = "/job:worker/replica:0/task:0"
_HEALTH_SECONDS = 1.0  # between two looks at the other ranks, and how long one may take to answer
_DEADLINE_EXCEEDED, _UNAVAILABLE = 4, 14  # status codes: of a wait too long, of a lost peer


PURPOSES = (
    *("world", "data", "shards", "replicas", "model", "tensor", "tied"),
    *("activations up", "activations down", "gradients up", "gradients down"),
)
"""What groups are for: together with a rank, what tells one from another."""


@dataclass(frozen=True)
class Group:
    """Ranks that communicate, in the order of their parts. `rank`: this rank's place among them.

    `scatters`: whether the device has a reduce-scatter of its own; a CPU has none.
    """

    name: str
    ranks: tuple[int, ...]
    rank: int
    key: int
    scatters: bool = False
    _instances: count[int] = field(default_factory=lambda: count(1), repr=False, compare=False)

    @property
    def size(self) -> int:
        return len(self.ranks)

    def call(self) -> dict[str, Any]:
        """What the next collective of this group has in common with its other ends."""
        return {
            "group_size": self.size,
            "group_key": self.key,
            "instance_key": next(self._instances),
        }


class GroupMaker:
    """Gives groups their keys: equal on all members, and different from every other group of the process's life.

    Args:
        name: of this start of the run. Keys of an earlier one are never used again, since a key is bound to its shapes.
    """

    def __init__(self, name: str, rank: int, world_size: int, *, scatters: bool = False) -> None:
        self._rank, self._world_size, self._scatters = rank, world_size, scatters
        self._base = zlib.crc32(name.encode()) % (1 << 30)

    def group(self, purpose: str, ranks: Sequence[int]) -> Group:
        """The group of `ranks`, which has this rank. Groups of one purpose have no rank in common."""
        return self._make(purpose, tuple(ranks), min(ranks))

    def several(self, purpose: str, ranks: Sequence[int]) -> Group | None:
        """A group, or None if it would be this rank alone."""
        return self.group(purpose, ranks) if len(ranks) > 1 else None

    def link(self, purpose: str, source: int, target: int) -> Group:
        """The pair that `source` sends to `target` in. A source has one target for each purpose."""
        return self._make(purpose, (source, target), source)

    def _make(self, purpose: str, ranks: tuple[int, ...], number: int) -> Group:
        key = (self._base + PURPOSES.index(purpose) * self._world_size + number) % (1 << 31)
        return Group(purpose, ranks, ranks.index(self._rank), key, self._scatters)


@dataclass(frozen=True)
class TensorGroup:
    """The ranks that share one layer's matrices. `handle` is None when there is only one."""

    handle: Group | None = None
    rank: int = 0
    size: int = 1
    sequence_parallel: bool = False


# -- collectives -----------------------------------------------------------------------------------------------------


def all_reduce(tensor: Tensor, group: Group | None, operation: Literal["Add", "Max"] = "Add") -> Tensor:
    """The sum (or largest) over the group, element by element; `tensor` itself where there is no group."""
    if group is None:
        return tensor
    return tf.raw_ops.CollectiveReduceV2(
        input=tensor, merge_op=operation, final_op="Id", ordering_token=[], **group.call()
    )


def all_gather(tensor: Tensor, group: Group) -> Tensor:
    """(n, ...) on each rank to (size * n, ...) on all, in the group's order."""
    carried = _carried(tensor)
    gathered = tf.raw_ops.CollectiveGatherV2(input=carried, ordering_token=[], **group.call())
    gathered = tf.ensure_shape(gathered, (group.size * tensor.shape[0], *tensor.shape[1:]))
    return _delivered(gathered, tensor.dtype)


def reduce_scatter(tensor: Tensor, group: Group) -> Tensor:
    """(size * n, ...) on each rank, summed, to (n, ...) of it on each.

    Where the device has no such operation, each rank sends every other its part, and sums what it gets.
    """
    if group.scatters:
        return tf.raw_ops.CollectiveReduceScatterV2(
            input=tensor, merge_op="Add", final_op="Id", ordering_token=[], **group.call()
        )
    parts = tf.reshape(tensor, (group.size, tensor.shape[0] // group.size, *tensor.shape[1:]))
    return tf.reduce_sum(all_to_all(parts, group), axis=0)


def all_to_all(tensor: Tensor, group: Group) -> Tensor:
    """Row r of the result is what rank r of the group had in this rank's row. (size, ...) to the same."""
    return tf.raw_ops.CollectiveAllToAllV2(input=tensor, ordering_token=[], **group.call())


def send(tensor: Tensor, link: Group) -> Tensor:
    """Send to the link's other end. Runs only where something depends on the result."""
    return tf.raw_ops.CollectiveBcastSendV2(input=_carried(tensor), **link.call())


def receive(spec: tf.TensorSpec, link: Group) -> Tensor:
    """What the link's other end sends, of the shape and dtype of `spec`."""
    carried = tf.float16 if spec.dtype == tf.bfloat16 else spec.dtype
    received = tf.raw_ops.CollectiveBcastRecvV2(shape=spec.shape, T=carried, **link.call())
    return _delivered(tf.ensure_shape(received, spec.shape), spec.dtype)


def _carried(tensor: Tensor) -> Tensor:
    """Gathering and sending take no bfloat16; the same bits travel as float16."""
    return tf.bitcast(tensor, tf.float16) if tensor.dtype == tf.bfloat16 else tensor


def _delivered(tensor: Tensor, dtype: tf.DType) -> Tensor:
    return tf.bitcast(tensor, dtype) if dtype == tf.bfloat16 else tensor


# -- their gradients -------------------------------------------------------------------------------------------------


def _all_gather_sequence(tensor: Tensor, group: Group) -> Tensor:
    """(batch, part, ...) on each rank to (batch, part * size, ...) on all."""
    batch, part, *rest = tensor.shape
    gathered = tf.reshape(all_gather(tensor, group), (group.size, batch, part, *rest))
    return tf.reshape(_swap_first_two(gathered), (batch, group.size * part, *rest))


def _reduce_scatter_sequence(tensor: Tensor, group: Group) -> Tensor:
    """(batch, length, ...) on each rank, summed, to (batch, length / size, ...) of it on each."""
    batch, length, *rest = tensor.shape
    parts = _swap_first_two(tf.reshape(tensor, (batch, group.size, length // group.size, *rest)))
    return reduce_scatter(tf.reshape(parts, (group.size * batch, length // group.size, *rest)), group)


def _swap_first_two(tensor: Tensor) -> Tensor:
    return tf.transpose(tensor, (1, 0, *range(2, tensor.shape.rank)))


def _with_gradient(
    tensor: Tensor, forward: Callable[[Tensor], Tensor], backward: Callable[[Tensor], Tensor]
) -> Tensor:
    @tf.custom_gradient
    def call(inputs: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        return forward(inputs), backward

    return call(tensor)


def enter_parallel(hidden: Tensor, group: TensorGroup) -> Tensor:
    """Hidden states as a column-parallel layer needs them: the whole sequence, gradients summed over the group."""
    handle = group.handle
    if handle is None:
        return hidden
    if group.sequence_parallel:
        return _with_gradient(
            hidden,
            lambda part: _all_gather_sequence(part, handle),
            lambda gradient: _reduce_scatter_sequence(gradient, handle),
        )
    return _with_gradient(hidden, tf.identity, lambda gradient: all_reduce(gradient, handle))


def leave_parallel(partial: Tensor, group: TensorGroup) -> Tensor:
    """Partial sums of a row-parallel layer, summed: whole, or this rank's part of the sequence."""
    handle = group.handle
    if handle is None:
        return partial
    if group.sequence_parallel:
        return _with_gradient(
            partial,
            lambda whole: _reduce_scatter_sequence(whole, handle),
            lambda gradient: _all_gather_sequence(gradient, handle),
        )
    return _with_gradient(partial, lambda whole: all_reduce(whole, handle), tf.identity)


def gather_features(part: Tensor, group: TensorGroup, axis: int = -1) -> Tensor:
    """Each rank's part along `axis`, joined. All ranks go on with the same, so each has the whole gradient already."""
    handle = group.handle
    if handle is None:
        return part
    return _with_gradient(
        part,
        lambda own: _joined_along(own, handle, axis),
        lambda gradient: _own_along(gradient, handle, axis),
    )


def split_features(whole: Tensor, group: TensorGroup, axis: int = -1) -> Tensor:
    """This rank's part of `whole` along `axis`; its gradient is joined from all ranks' parts."""
    handle = group.handle
    if handle is None:
        return whole
    return _with_gradient(
        whole,
        lambda tensor: _own_along(tensor, handle, axis),
        lambda gradient: _joined_along(gradient, handle, axis),
    )


def _joined_along(part: Tensor, group: Group, axis: int) -> Tensor:
    first = axis % part.shape.rank
    turned = (first, *(other for other in range(part.shape.rank) if other != first))
    gathered = all_gather(tf.transpose(part, turned), group)
    back = [turned.index(axis) for axis in range(part.shape.rank)]
    return tf.transpose(gathered, back)


def _own_along(whole: Tensor, group: Group, axis: int) -> Tensor:
    return tf.split(whole, group.size, axis)[group.rank]


class StageLinks:
    """Point-to-point calls between the pipeline ranks of one line.

    Args:
        ranks: the rank at each pipeline coordinate.
        make: where the links' groups come from; there is one for each direction and kind of message.
    """

    def __init__(self, ranks: tuple[int, ...], make: GroupMaker) -> None:
        self._ranks, self._make = ranks, make
        self._links: dict[tuple[int, int, bool], Group] = {}

    def link(self, source: int, target: int, *, forward: bool) -> Group:
        """From pipeline coordinate `source` to `target`, one of them here; for activations, or for gradients."""
        key = (source, target, forward)
        if key not in self._links:
            ascending = "up" if target > source else "down"
            purpose = f"{'activations' if forward else 'gradients'} {ascending}"
            self._links[key] = self._make.link(purpose, self._ranks[source], self._ranks[target])
        return self._links[key]


# -- the cluster -----------------------------------------------------------------------------------------------------


def start_server(addresses: Sequence[str], rank: int, *, gpu: bool) -> None:
    """Make this process rank `rank` of the cluster at `addresses` ("host:port" of each rank). Once a process.

    Raises RuntimeError when TensorFlow has been used in this process already.
    """
    cluster = tf.train.ClusterSpec({"worker": list(addresses)})
    ours: Any = context.context()
    ours.configure_collective_ops(
        collective_leader=_LEADER,
        scoped_allocator_enabled_ops=(),
        use_nccl_communication=gpu,
        device_filters=[],
    )
    server = tf.train.ServerDef(
        cluster=cluster.as_cluster_def(),
        job_name="worker",
        task_index=rank,
        protocol="grpc",
        port=int(addresses[rank].rpartition(":")[2]),
    )
    server.default_session_config.experimental.collective_group_leader = _LEADER
    ours.enable_collective_ops(server)


@contextmanager
def deadline(seconds: float, rank: int, activity: str) -> Iterator[None]:
    """Abort this process's collectives when what runs within has not ended after `seconds`.

    Not by the collectives' own `timeout_seconds`: for that, TensorFlow has a thread of its own sleep so long for each of them,
    ended or not, and soon runs out of threads.
    """
    message = f"rank {rank} has waited {seconds:g} s for other ranks: {activity}"
    ours: Any = context.context()
    timer = threading.Timer(seconds, ours.abort_collective_ops, (_DEADLINE_EXCEEDED, message))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def await_peers(ranks: Sequence[int], seconds: float) -> list[int]:
    """Wait until every one of `ranks` has answered once, for up to `seconds`; gives those that have not."""
    end = time.monotonic() + seconds
    missing = list(ranks)
    while missing := [rank for rank in missing if _answer(rank) is not None]:
        if time.monotonic() > end:
            break
        time.sleep(0.1)
    return missing


def _answer(rank: int) -> str | None:
    """None when rank `rank` answers, else what stands in the way."""
    ours: Any = context.context()
    try:
        ours.check_collective_ops_peer_health(
            f"/job:worker/replica:0/task:{rank}", timeout_in_ms=int(5000 * _HEALTH_SECONDS)
        )
    except tf.errors.OpError as error:
        return str(error.message)
    return None


def watch_peers(ranks: Sequence[int]) -> Callable[[], None]:
    """Look at `ranks` all the time; when one does not answer, abort this process's collectives with an error naming it.

    Gives what ends the looking.
    """
    done = threading.Event()

    def watch() -> None:
        ours: Any = context.context()
        while not done.wait(_HEALTH_SECONDS):
            for rank in ranks:
                silence = _answer(rank)
                if silence is None:
                    continue
                if not done.is_set():
                    message = f"rank {rank} is gone: it does not answer ({silence})"
                    ours.abort_collective_ops(_UNAVAILABLE, message)
                return

    threading.Thread(target=watch, name="mpsdk-watchdog", daemon=True).start()
    return done.set
