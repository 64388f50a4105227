"""Where the ranks of a training script stand, without a plan: what `transform` and `parallelize_model` work on.

A script that brings its own loop has no plan. It has a `Distribution`, and this room makes its mesh and its groups.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from mpsdk.config import Distribution
from mpsdk.errors import BackendError, ConfigError, Problem
from mpsdk.topology import DEFAULT_PLACEMENT, Coordinates, Degrees, Topology
from mpsdk_torch.comm import TensorGroup

Config = Distribution | Mapping[str, object] | str | os.PathLike[str]


@dataclass(frozen=True)
class Layout:
    """This rank's place on the mesh of replicas, shards and tensor-parallel ranks.

    `mesh` has the axes `dp`, `sdp` and `tp`: give `mesh["sdp"]` or `mesh["dp", "sdp"]` to FSDP2, and
    `mesh["sdp"].get_group()` to FSDP1. None in a world of one rank that has joined nobody.
    """

    distribution: Distribution
    topology: Topology
    coordinates: Coordinates
    tensor: TensorGroup
    mesh: DeviceMesh | None


_current: list[tuple[Layout, object]] = []  # the last one, and the world that it was made in


def lay_out(config: Config) -> Layout:
    """Make the groups of `config` over the ranks that have joined, and remember them. All ranks call this together.

    Raises:
        ConfigError: an invalid configuration, a pipeline, or degrees whose product is not the number of ranks.
        BackendError: several ranks are asked for, and `torch.distributed` has not been initialised.
    """
    distribution = config if isinstance(config, Distribution) else Distribution.parse(config)
    world = dist.get_world_size() if dist.is_initialized() else 1
    topology = Topology(_degrees(distribution, world), distribution.placement or DEFAULT_PLACEMENT)
    if not dist.is_initialized():
        layout = Layout(distribution, topology, Coordinates(), TensorGroup(), None)
    else:
        coordinates = topology.coordinates(dist.get_rank())
        ranks = torch.from_numpy(topology.mesh()[0, :, :, 0, :].copy())
        mesh = DeviceMesh(device().type, ranks, mesh_dim_names=("dp", "sdp", "tp"))
        handle = mesh["tp"].get_group() if topology.degrees.tp > 1 else None
        tensor = TensorGroup(handle, coordinates.tp, topology.degrees.tp)
        layout = Layout(distribution, topology, coordinates, tensor, mesh)
    _current[:] = [(layout, _world())]
    return layout


def current() -> Layout | None:
    """The layout made last; None: none was, or its ranks have left."""
    layout, world = _current[0] if _current else (None, None)
    return layout if world is _world() else None


def _world() -> object:
    return dist.group.WORLD if dist.is_initialized() else None


def device() -> torch.device:
    """Where this rank computes, and its collectives work: its GPU under NCCL, else the CPU."""
    if dist.is_initialized() and "nccl" in dist.get_backend():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def agree(failure: Exception | None, what: str) -> None:
    """Raise BackendError where `what` has failed on another rank, so that none waits for it; all ranks call this together."""
    if not dist.is_initialized():
        return
    failed = torch.zeros(dist.get_world_size(), dtype=torch.int32, device=device())
    failed[dist.get_rank()] = failure is not None
    dist.all_reduce(failed)
    if failure is None and (ranks := failed.nonzero().flatten().tolist()):
        raise BackendError(f"{what} failed on rank {', '.join(map(str, ranks))}; its own error says why")


def _degrees(distribution: Distribution, world: int) -> Degrees:
    problems: list[Problem] = []
    if distribution.pipeline.degree > 1:
        remedy = "a module that is whole has no stages; use 1, or train with mpsdk's Estimator"
        problems.append(Problem("pipeline.degree", distribution.pipeline.degree, remedy))
    tp, sdp = distribution.tensor_parallel.degree, distribution.sharded_data_parallel.degree
    dp = distribution.data_parallel
    replicas = world // (tp * sdp) if dp == "fill" else dp
    product = f"tensor_parallel.degree {tp} x sharded_data_parallel.degree {sdp}"
    if dp != "fill":
        product += f" x data_parallel {dp}"
    if not problems and replicas * tp * sdp != world:
        if not dist.is_initialized():
            raise BackendError(
                f"{product} asks for several ranks, and this process has joined none: start the script with torchrun, and "
                "call torch.distributed.init_process_group first"
            )
        remedy = f"{product} must {'divide' if dp == 'fill' else 'equal'} it"
        problems.append(Problem("world_size", world, remedy))
    if problems:
        raise ConfigError(problems, where="the layout")
    return Degrees(dp=replicas, sdp=sdp, tp=tp)


def tensor_group() -> TensorGroup:
    """The tensor-parallel ranks of the layout made last, which a parallel twin makes itself for."""
    layout = current()
    return TensorGroup() if layout is None else layout.tensor
