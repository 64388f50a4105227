"""Who is who: the five mesh axes, ranks and their coordinates, and the groups of ranks that work together.

Pure arithmetic; a backend makes its communicators from `Topology.groups`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mpsdk.errors import ConfigError, Problem

AXES = ("pp", "dp", "sdp", "cp", "tp")
DEFAULT_PLACEMENT = ",".join(AXES)


class Degrees(NamedTuple):
    """How many ranks lie along each axis."""

    pp: int = 1  # pipeline
    dp: int = 1  # replicas
    sdp: int = 1  # sharded data parallel
    cp: int = 1  # context parallel
    tp: int = 1  # tensor parallel


class Coordinates(NamedTuple):
    """Where a rank stands on each axis, counted from 0."""

    pp: int = 0
    dp: int = 0
    sdp: int = 0
    cp: int = 0
    tp: int = 0


@dataclass(frozen=True, init=False)
class Topology:
    """A mesh of ranks: degrees along `AXES`, laid out over rank numbers by `placement`.

    The right-most axis of `placement` varies fastest: its neighbours have consecutive ranks. In the default,
    `"pp,dp,sdp,cp,tp"`, a tensor-parallel group shares a machine and pipeline stages lie farthest apart.

    >>> topology = Topology(Degrees(pp=2, tp=2))
    >>> topology.coordinates(3)
    Coordinates(pp=1, dp=0, sdp=0, cp=0, tp=1)
    >>> topology.groups(("pp",))
    ((0, 2), (1, 3))

    Args:
        degrees: `Degrees`, or a mapping from axis to degree; an axis left out has degree 1.
        placement: a permutation of the five axes.

    Raises:
        ConfigError: an unknown axis, a degree below 1, or a placement that is no permutation of the axes.
    """

    degrees: Degrees
    placement: str

    def __init__(self, degrees: Degrees | Mapping[str, int], placement: str = DEFAULT_PLACEMENT) -> None:
        given = degrees._asdict() if isinstance(degrees, Degrees) else dict(degrees)
        problems = [
            Problem(axis, degree, f"a mesh axis is one of {', '.join(AXES)}, with a degree of at least 1")
            for axis, degree in given.items()
            if axis not in AXES or degree < 1
        ]
        order = tuple(axis.strip() for axis in placement.split(","))
        if sorted(order) != sorted(AXES):
            problems.append(
                Problem("placement", placement, f"use each axis once, such as {DEFAULT_PLACEMENT!r}")
            )
        if problems:
            raise ConfigError(problems, where="the topology")
        object.__setattr__(self, "degrees", Degrees(**given))
        object.__setattr__(self, "placement", ",".join(order))

    @property
    def world_size(self) -> int:
        return math.prod(self.degrees)

    @property
    def data_size(self) -> int:
        """Number of data ranks: dp * sdp."""
        return self.degrees.dp * self.degrees.sdp

    @cached_property
    def _mesh(self) -> NDArray[np.int64]:
        order = [AXES.index(axis) for axis in self.placement.split(",")]
        ranks = np.arange(self.world_size).reshape([self.degrees[axis] for axis in order])
        mesh = ranks.transpose(np.argsort(order))
        mesh.flags.writeable = False
        return mesh

    @cached_property
    def _strides(self) -> tuple[int, ...]:
        """How far apart in rank two neighbours along each axis are, in `AXES` order."""
        stride_of: dict[str, int] = {}
        stride = 1
        for axis in reversed(self.placement.split(",")):
            stride_of[axis] = stride
            stride *= getattr(self.degrees, axis)
        return tuple(stride_of[axis] for axis in AXES)

    def mesh(self) -> NDArray[np.int64]:
        """The ranks as an array of shape `degrees`, indexed by coordinates. Read-only."""
        return self._mesh

    def coordinates(self, rank: int) -> Coordinates:
        """Where `rank` stands. Raises ValueError outside 0 .. world_size - 1."""
        self._check(rank)
        places = zip(self._strides, self.degrees, strict=True)
        return Coordinates(*(rank // stride % degree for stride, degree in places))

    def rank_of(self, coordinates: Coordinates) -> int:
        """The rank at `coordinates`. Raises ValueError outside the mesh."""
        if not all(0 <= place < degree for place, degree in zip(coordinates, self.degrees, strict=True)):
            raise ValueError(f"{coordinates} lies outside the mesh {self.degrees}")
        return sum(place * stride for place, stride in zip(coordinates, self._strides, strict=True))

    def group(self, rank: int, axes: tuple[str, ...]) -> tuple[int, ...]:
        """The ranks that differ from `rank` along `axes` only, by their coordinates in `AXES` order."""
        _check_axes(axes)
        here = self.coordinates(rank)
        free = tuple(slice(None) if axis in axes else place for axis, place in zip(AXES, here, strict=True))
        return tuple(self._mesh[free].ravel().tolist())

    def groups(self, axes: tuple[str, ...]) -> tuple[tuple[int, ...], ...]:
        """Every group along `axes`, ordered by the other coordinates; a rank is in exactly one."""
        _check_axes(axes)
        inside = [number for number, axis in enumerate(AXES) if axis in axes]
        outside = [number for number, axis in enumerate(AXES) if axis not in axes]
        size = math.prod(self.degrees[axis] for axis in inside)
        rows = self._mesh.transpose([*outside, *inside]).reshape(-1, size)
        return tuple(tuple(row) for row in rows.tolist())

    def data_rank(self, rank: int) -> int:
        """The coordinate over dp and sdp, which decides the rows of the batch: dp * sdp degree + sdp."""
        here = self.coordinates(rank)
        return here.dp * self.degrees.sdp + here.sdp

    def _check(self, rank: int) -> None:
        if not 0 <= rank < self.world_size:
            raise ValueError(f"rank {rank} is outside the world of {self.world_size} ranks {self.degrees}")


def _check_axes(axes: tuple[str, ...]) -> None:
    if unknown := [axis for axis in axes if axis not in AXES]:
        raise ValueError(f"unknown mesh axes {unknown}; the axes are {', '.join(AXES)}")
