"""Groups for the plan's axes. Who is in which group stands in the plan; this room only gives them their keys.

A group needs no making: the ranks of it find each other when they first use its key. Only groups that somebody uses are
named: an axis of one rank has none.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import keras
import tensorflow as tf

from mpsdk.backend import Place
from mpsdk.errors import BackendError
from mpsdk.launch.control import Control
from mpsdk.plan import Plan
from mpsdk.topology import Coordinates
from mpsdk_tf.comm import Group, GroupMaker, StageLinks, TensorGroup, await_peers, start_server, watch_peers


@dataclass(frozen=True)
class Membership:
    """This process's place in the cluster: the device to work on, and what ends the looking after other ranks."""

    device: str
    stop_watching: Callable[[], None] = lambda: None


@dataclass(frozen=True)
class Groups:
    """This rank's groups. None where the group would be this rank alone."""

    coordinates: Coordinates
    device: str
    tensor: TensorGroup
    data: Group | None  # dp and sdp: different rows of the batch
    shards: Group | None  # sdp: parts of the same weights
    replicas: Group | None  # dp: copies of them
    model: Group | None  # pp, sdp and tp: one whole model
    tied: Group | None  # the two stages with a copy of a tied tensor
    world: Group | None
    links: StageLinks | None

    @property
    def on_gpu(self) -> bool:
        return "GPU" in self.device


_joined: list[tuple[int, int]] = []  # rank and world size of this process's server, which starts once


def join(place: Place, *, threads: bool) -> Membership:
    """Join the other ranks and give this rank's device: a GPU where there are any, else the CPU.

    Addresses come from TF_CONFIG where it is set; else the ranks leave them for each other beside `place.store` or
    `place.folder`.

    Args:
        threads: the ranks are threads of one process, each with a logical CPU device of its own.

    Raises BackendError when there are GPUs, and not one for each process, when this process was another rank before, when
    another rank does not come within `place.timeout` seconds, or when another way of spreading models is in force.
    """
    _refuse_other_ways()
    if threads:
        return Membership(f"/device:CPU:{place.local_rank}")
    gpus = tf.config.list_physical_devices("GPU")
    if 0 < len(gpus) <= place.local_rank:
        raise BackendError(
            f"process {place.local_rank} of this machine needs a GPU of its own, and there are {len(gpus)}; start at most "
            f"{len(gpus)} processes here, or hide the GPUs with CUDA_VISIBLE_DEVICES= to run on the CPU"
        )
    if gpus and not _joined:
        tf.config.set_visible_devices(gpus[place.local_rank], "GPU")
        tf.config.experimental.set_memory_growth(gpus[place.local_rank], True)
    kind = "GPU" if gpus else "CPU"
    if place.world_size == 1:
        return Membership(f"/device:{kind}:0")
    place.note(f"joining {place.world_size} ranks")
    here = (place.rank, place.world_size)
    others = [rank for rank in range(place.world_size) if rank != place.rank]
    if not _joined:
        addresses = _addresses(place)
        start_server(addresses, place.rank, gpu=bool(gpus))
        _joined.append(here)
        missing = await_peers(others, place.timeout)
        if missing:
            raise BackendError(
                f"rank {place.rank} has waited {place.timeout:g} s and these do not answer: "
                + ", ".join(f"rank {rank} at {addresses[rank]}" for rank in missing)
                + "; is every rank started, and does TF_CONFIG say the same addresses everywhere?"
            )
    elif _joined != [here]:
        raise BackendError(
            f"this process was rank {_joined[0][0]} of {_joined[0][1]} before and can't become rank {place.rank} of "
            f"{place.world_size}: TensorFlow starts its server once; use a new process"
        )
    device = f"/job:worker/replica:0/task:{place.rank}/device:{kind}:0"
    return Membership(device, watch_peers(others))


def _refuse_other_ways() -> None:
    if keras.distribution.distribution() is not None:
        raise BackendError(
            "keras.distribution is set, which has no effect on TensorFlow; leave it out "
            "(keras.distribution.set_distribution(None)), and say in Distribution how to spread the model"
        )
    if tf.distribute.has_strategy():
        raise BackendError(
            f"this is within the scope of {type(tf.distribute.get_strategy()).__name__}, whose replicas mpsdk's ranks are not; "
            "call mpsdk outside of it"
        )


def _addresses(place: Place) -> list[str]:
    """ "host:port" of every rank.

    Raises BackendError when nothing says where the ranks are, or TF_CONFIG does not fit them.
    """
    if "TF_CONFIG" in os.environ:
        return _addresses_of(os.environ["TF_CONFIG"], place)
    if place.store is None and place.folder is None:
        raise BackendError(
            "nothing says where the other ranks are: start the run with mpsdk's launcher, or set TF_CONFIG"
        )
    one_machine = int(os.environ.get("LOCAL_WORLD_SIZE", place.world_size)) == place.world_size
    host = "127.0.0.1" if one_machine else socket.gethostname()
    meeting = Path(f"{place.store or place.folder}-tensorflow")
    meeting.mkdir(parents=True, exist_ok=True)
    control = Control(meeting, "addresses", place.rank, place.world_size, place.timeout, place.note)
    with closing(socket.socket()) as probe:  # TensorFlow's server can't take a socket that is open already
        probe.bind((host, 0))
        control.publish("address", f"{host}:{probe.getsockname()[1]}")
        return control.collect("address")


def _addresses_of(text: str, place: Place) -> list[str]:
    try:
        config = json.loads(text)
        addresses = [str(address) for address in config["cluster"]["worker"]]
        task = config["task"]
        kind, index = task["type"], int(task["index"])
    except (ValueError, KeyError, TypeError) as error:
        raise BackendError(
            f"TF_CONFIG can't be read ({error!r}); it looks like "
            '{"cluster": {"worker": ["host:port", ...]}, "task": {"type": "worker", "index": 0}}'
        ) from error
    if kind != "worker" or index != place.rank or len(addresses) != place.world_size:
        raise BackendError(
            f"TF_CONFIG says {kind} {index} of {len(addresses)}, and this is rank {place.rank} of {place.world_size}; every "
            "rank is a worker, and its index is its rank"
        )
    return addresses


def make_groups(plan: Plan, place: Place, device: str) -> Groups:
    """The groups of this rank."""
    topology, rank = plan.topology, place.rank
    make = GroupMaker(str(place.store or place.folder), rank, place.world_size, scatters="GPU" in device)
    coordinates = topology.coordinates(rank)
    tensor = make.several("tensor", topology.group(rank, ("tp",)))
    tied = plan.tied_group(rank)
    return Groups(
        coordinates=coordinates,
        device=device,
        tensor=TensorGroup(
            handle=tensor,
            rank=coordinates.tp,
            size=plan.degrees.tp,
            sequence_parallel=tensor is not None and plan.distribution.tensor_parallel.sequence_parallel,
        ),
        data=make.several("data", topology.group(rank, ("dp", "sdp"))),
        shards=make.several("shards", topology.group(rank, ("sdp",))),
        replicas=make.several("replicas", topology.group(rank, ("dp",))),
        model=make.several("model", topology.group(rank, ("pp", "sdp", "tp"))),
        tied=make.group("tied", tied) if tied else None,
        world=make.several("world", range(place.world_size)),
        links=StageLinks(topology.group(rank, ("pp",)), make) if plan.degrees.pp > 1 else None,
    )
