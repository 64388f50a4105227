"""Collectives between ranks against what they are defined to give, and where TensorFlow's private symbols are used."""

from __future__ import annotations

import inspect
import json
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from tensorflow.python.eager import context

import mpsdk_tf
from mpsdk.backend import Place
from mpsdk.errors import BackendError
from mpsdk_tf import comm
from mpsdk_tf.topology import _addresses_of, join
from tests.tf import ranks

DTYPES = (tf.float32, tf.bfloat16, tf.float16)
HOME = Path(inspect.getfile(mpsdk_tf)).parent


def group_of(place: Place, purpose: str = "world") -> comm.Group:
    make = comm.GroupMaker(str(place.store), place.rank, place.world_size)
    return make.group(purpose, range(place.world_size))


def whole(place: Place, dtype: tf.DType) -> comm.Tensor:
    """(4, 3), different on each rank, exact in every dtype."""
    return tf.cast(tf.reshape(tf.range(12), (4, 3)) + 16 * place.rank, dtype)


def collectives(place: Place, dtype: tf.DType) -> dict[str, Any]:
    group = group_of(place)

    @tf.function(autograph=False)
    def program(tensor: comm.Tensor) -> dict[str, comm.Tensor]:
        return {
            "sum": comm.all_reduce(tensor, group),
            "largest": comm.all_reduce(tensor, group, "Max"),
            "gathered": comm.all_gather(tensor, group),
            "scattered": comm.reduce_scatter(tensor, group),
            "exchanged": comm.all_to_all(tf.reshape(tensor, (place.world_size, -1)), group),
        }

    with tf.device(f"CPU:{place.rank}"):
        found = program(whole(place, dtype))
        again = program(whole(place, dtype))  # the same keys, used again
    for name, value in found.items():
        np.testing.assert_array_equal(value, again[name], err_msg=name)
        assert value.dtype == dtype
    return {name: tf.cast(value, tf.float32).numpy() for name, value in found.items()}


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.name)
def test_collectives_give_what_their_names_say(dtype: tf.DType) -> None:
    size = 4
    inputs = np.stack([np.arange(12, dtype=np.float32).reshape(4, 3) + 16 * rank for rank in range(size)])
    for rank, found in enumerate(ranks.run(size, collectives, dtype)):
        np.testing.assert_array_equal(found["sum"], inputs.sum(0))
        np.testing.assert_array_equal(found["largest"], inputs.max(0))
        np.testing.assert_array_equal(found["gathered"], inputs.reshape(16, 3))
        np.testing.assert_array_equal(found["scattered"], inputs.sum(0)[rank : rank + 1])
        np.testing.assert_array_equal(found["exchanged"], inputs[:, rank])


def passed_on(place: Place, dtype: tf.DType) -> Any:
    """Each rank sends to the next, in a ring, and receives from the one before."""
    make = comm.GroupMaker(str(place.store), place.rank, place.world_size)
    after, before = ((place.rank + step) % place.world_size for step in (1, -1))

    @tf.function(autograph=False)
    def program(tensor: comm.Tensor) -> comm.Tensor:
        sent = comm.send(tensor, make.link("activations up", place.rank, after))
        received = comm.receive(
            tf.TensorSpec(tensor.shape, dtype), make.link("activations up", before, place.rank)
        )
        with tf.control_dependencies([sent]):
            return tf.identity(received)

    with tf.device(f"CPU:{place.rank}"):
        return tf.cast(program(whole(place, dtype)), tf.float32).numpy()


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.name)
def test_what_is_sent_arrives(dtype: tf.DType) -> None:
    for rank, received in enumerate(ranks.run(3, passed_on, dtype)):
        np.testing.assert_array_equal(received, np.arange(12).reshape(4, 3) + 16 * ((rank - 1) % 3))


def enter_and_leave(place: Place, sequence_parallel: bool) -> tuple[Any, Any]:
    """The result and the gradient of leave_parallel(weight * enter_parallel(x)), with a weight of this rank's own."""
    group = comm.TensorGroup(group_of(place), place.rank, place.world_size, sequence_parallel)

    @tf.function(autograph=False)
    def program(inputs: comm.Tensor) -> tuple[comm.Tensor, comm.Tensor]:
        with tf.GradientTape() as tape:
            tape.watch(inputs)
            result = comm.leave_parallel(comm.enter_parallel(inputs, group) * (1.0 + place.rank), group)
            loss = tf.reduce_sum(result * result)
        return result, tape.gradient(loss, inputs)

    inputs = tf.reshape(tf.range(24, dtype=tf.float32), (2, 4, 3))
    if sequence_parallel:
        inputs = tf.split(inputs, place.world_size, axis=1)[place.rank]
    with tf.device(f"CPU:{place.rank}"):
        result, gradient = program(inputs)
    return result.numpy(), gradient.numpy()


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_entering_and_leaving_a_parallel_region_is_one_linear_map(sequence_parallel: bool) -> None:
    """Two ranks with weights 1 and 2: y = 3 x, and the gradient of sum(y^2) is 18 x."""
    results, gradients = zip(*ranks.run(2, enter_and_leave, sequence_parallel), strict=True)
    inputs = np.arange(24, dtype=np.float32).reshape(2, 4, 3)
    if sequence_parallel:
        results, gradients = [np.concatenate(results, axis=1)], [np.concatenate(gradients, axis=1)]
    for result, gradient in zip(results, gradients, strict=True):
        np.testing.assert_array_equal(result, 3 * inputs)
        np.testing.assert_array_equal(gradient, 18 * inputs)


def test_groups_have_keys_of_their_own_equal_on_all_members() -> None:
    world = 16
    makers = [comm.GroupMaker("a run", rank, world) for rank in range(world)]
    members: dict[int, set[tuple[str, tuple[int, ...]]]] = {}
    for rank, make in enumerate(makers):
        first = rank // 4 * 4
        groups = [
            make.group("world", range(world)),
            make.group("tensor", range(first, first + 4)),
            make.group("data", range(rank % 4, world, 4)),
            make.link("activations up", rank, (rank + 4) % world),
            make.link("activations up", (rank - 4) % world, rank),
            make.link("gradients down", rank, (rank - 4) % world),
        ]
        for group in groups:
            members.setdefault(group.key, set()).add((group.name, group.ranks))
            assert group.ranks[group.rank] == rank
    assert all(len(same) == 1 for same in members.values())
    other = comm.GroupMaker("another run", 0, world).group("world", range(world))
    assert other.key not in members


def test_private_symbols_of_tensorflow_are_in_two_modules_and_as_this_version_has_them() -> None:
    private = re.compile(
        r"^\s*(from|import) (tensorflow\.(python|core|compiler|tsl)|keras\.src)", re.MULTILINE
    )
    users = {
        path.relative_to(HOME).as_posix() for path in HOME.rglob("*.py") if private.search(path.read_text())
    }
    assert users == {"comm.py", "xplane.py"}
    assert version("tensorflow-cpu").startswith("2.21."), "look again at what these use, then change this"
    takes = {name: inspect.signature(getattr(context.Context, name)).parameters for name in USED}
    for name, arguments in USED.items():
        assert arguments <= set(takes[name]), name


USED = {
    "configure_collective_ops": {
        "collective_leader",
        "scoped_allocator_enabled_ops",
        "use_nccl_communication",
        "device_filters",
    },
    "enable_collective_ops": {"server_def"},
    "check_collective_ops_peer_health": {"task", "timeout_in_ms"},
    "abort_collective_ops": {"code", "message"},
}


def tf_config(workers: list[str], index: int, kind: str = "worker") -> str:
    return json.dumps({"cluster": {"worker": workers}, "task": {"type": kind, "index": index}})


def test_tf_config_gives_the_addresses() -> None:
    workers = ["one:1", "two:2"]
    assert _addresses_of(tf_config(workers, 1), Place(rank=1, world_size=2)) == workers


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "can't be read"),
        ("{}", "can't be read"),
        (tf_config(["one:1", "two:2"], 0), "worker 0 of 2, and this is rank 1 of 2"),
        (tf_config(["one:1"], 1), "worker 1 of 1, and this is rank 1 of 2"),
        (tf_config(["one:1", "two:2"], 1, "chief"), "chief 1 of 2"),
    ],
)
def test_a_tf_config_that_does_not_fit_is_refused(text: str, says: str) -> None:
    with pytest.raises(BackendError, match=says):
        _addresses_of(text, Place(rank=1, world_size=2))


def test_other_ways_of_spreading_a_model_are_refused() -> None:
    place = Place(rank=0, world_size=1)
    keras.distribution.set_distribution(keras.distribution.DataParallel(devices=["cpu:0"]))
    try:
        with pytest.raises(BackendError, match="no effect on TensorFlow"):
            join(place, threads=False)
    finally:
        keras.distribution.set_distribution(None)
    with (
        tf.distribute.OneDeviceStrategy("CPU:0").scope(),
        pytest.raises(BackendError, match="OneDeviceStrategy"),
    ):
        join(place, threads=False)
    assert join(place, threads=False).device == "/device:CPU:0"
