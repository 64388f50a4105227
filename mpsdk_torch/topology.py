"""Process groups for the plan's axes. Who is in which group stands in the plan; this room only makes the groups.

Only groups that somebody uses are made: an axis of one rank has none.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from itertools import pairwise

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from mpsdk.backend import Place
from mpsdk.errors import BackendError
from mpsdk.plan import Plan
from mpsdk.topology import Coordinates
from mpsdk_torch.comm import Route, StageLinks, TensorGroup


@dataclass(frozen=True)
class Groups:
    """This rank's groups. None where the group would be this rank alone."""

    coordinates: Coordinates
    device: torch.device
    tensor: TensorGroup
    data: dist.ProcessGroup | None  # dp and sdp: different rows of the batch
    model: dist.ProcessGroup | None  # pp, sdp and tp: one whole model
    tied: dist.ProcessGroup | None  # the two stages with a copy of a tied tensor
    links: StageLinks | None
    sharding: DeviceMesh | None  # (dp, sdp), as FSDP2 wants it


def join(place: Place) -> torch.device:
    """Join the other ranks and give this rank's device: NCCL where there are GPUs, else gloo.

    Raises BackendError when there are GPUs, and not one for each process.
    """
    gpus = torch.cuda.device_count()
    if 0 < gpus <= place.local_rank:
        raise BackendError(
            f"process {place.local_rank} of this machine needs a GPU of its own, and there are {gpus}; start at most {gpus} "
            "processes here, or hide the GPUs with CUDA_VISIBLE_DEVICES= to run on the CPU"
        )
    gpu = gpus > 0
    device = torch.device("cuda", place.local_rank) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    place.note(f"joining {place.world_size} ranks")
    if place.store is not None:
        rendezvous = {
            "init_method": f"file://{place.store}",
            "rank": place.rank,
            "world_size": place.world_size,
        }
    else:
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        rendezvous = {"init_method": "env://", "rank": place.rank, "world_size": place.world_size}
    # No device_id: with one, torch makes sub-groups by splitting the world's communicator, which needs every rank of the
    # world to take part in each; ours are made by their members alone.
    dist.init_process_group("nccl" if gpu else "gloo", timeout=timedelta(seconds=place.timeout), **rendezvous)
    return device


class _Maker:
    """Makes process groups for one rank; asked for the same ranks again, it gives the same group.

    Only the members take part, which is quick in a large world. torch names such a group after its members and the number of
    groups that a rank has made before, so members must have made equally many: every rank makes the same kinds of group in
    the same order, and the tied group, which only two stages have, comes last.
    """

    def __init__(self, place: Place) -> None:
        self._timeout = timedelta(seconds=place.timeout)
        self._made: dict[tuple[int, ...], dist.ProcessGroup] = {}
        if dist.group.WORLD is not None:
            self._made[tuple(range(place.world_size))] = dist.group.WORLD

    def group(self, ranks: tuple[int, ...]) -> dist.ProcessGroup:
        key = tuple(sorted(ranks))
        if key not in self._made:
            self._made[key] = self.own_group(ranks)
        return self._made[key]

    def several(self, ranks: tuple[int, ...]) -> dist.ProcessGroup | None:
        """A group, or None if it would be this rank alone."""
        return self.group(ranks) if len(ranks) > 1 else None

    def own_group(self, ranks: tuple[int, ...]) -> dist.ProcessGroup:
        """A group that nothing else shares, even one of the same ranks."""
        group = dist.new_group(list(ranks), timeout=self._timeout, use_local_synchronization=True)
        assert isinstance(group, dist.ProcessGroup)
        return group


def make_groups(plan: Plan, place: Place, device: torch.device, *, sharding: bool) -> Groups:
    """The groups of this rank. All ranks call this together; `sharding` says whether FSDP2 needs its mesh."""
    topology, rank, make = plan.topology, place.rank, _Maker(place)
    coordinates = topology.coordinates(rank)
    tensor = make.several(topology.group(rank, ("tp",)))
    data = make.several(topology.group(rank, ("dp", "sdp")))
    model = make.several(topology.group(rank, ("pp", "sdp", "tp")))
    mesh = _sharding_mesh(plan, rank, device, make) if sharding else None
    links = _stage_links(plan, rank, make) if plan.degrees.pp > 1 else None
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
        data=data,
        model=model,
        tied=make.own_group(tied) if tied else None,
        links=links,
        sharding=mesh,
    )


def _stage_links(plan: Plan, rank: int, make: _Maker) -> StageLinks:
    routes: set[Route] = set()
    for source, target in pairwise(plan.schedule.stage_rank):
        if source != target:
            routes |= {Route(True, target > source), Route(False, source > target)}
    ranks = plan.topology.group(rank, ("pp",))
    return StageLinks(ranks, {route: make.own_group(ranks) for route in sorted(routes)})


def _sharding_mesh(plan: Plan, rank: int, device: torch.device, make: _Maker) -> DeviceMesh:
    topology = plan.topology
    place = topology.coordinates(rank)
    mesh = [
        [topology.rank_of(place._replace(dp=dp, sdp=sdp)) for sdp in range(plan.degrees.sdp)]
        for dp in range(plan.degrees.dp)
    ]
    shards = make.group(topology.group(rank, ("sdp",)))
    if plan.degrees.dp == 1:
        return DeviceMesh.from_group(shards, device.type, mesh=mesh[0], mesh_dim_names=("sdp",))
    replicas = make.group(topology.group(rank, ("dp",)))
    return DeviceMesh.from_group(
        [replicas, shards], device.type, mesh=torch.tensor(mesh), mesh_dim_names=("dp", "sdp")
    )
