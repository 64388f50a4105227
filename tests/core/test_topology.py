"""Ranks, coordinates and groups, for every shape of mesh and every placement."""

from __future__ import annotations

from itertools import combinations, permutations, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpsdk.errors import ConfigError
from mpsdk.topology import AXES, Coordinates, Degrees, Topology

degrees = st.tuples(*[st.integers(1, 3)] * 5).map(lambda numbers: Degrees(*numbers))
placements = st.sampled_from([",".join(order) for order in permutations(AXES)])
topologies = st.builds(Topology, degrees, placements)
some_axes = st.sampled_from([axes for count in range(6) for axes in combinations(AXES, count)])


@settings(deadline=None)
@given(topologies)
def test_rank_and_coordinates_are_inverse(topology):
    mesh = topology.mesh()
    assert mesh.shape == topology.degrees
    assert sorted(mesh.ravel()) == list(range(topology.world_size))
    for rank in range(topology.world_size):
        coordinates = topology.coordinates(rank)
        assert topology.rank_of(coordinates) == rank == mesh[coordinates]


@settings(deadline=None)
@given(topologies, some_axes)
def test_groups_part_the_world_and_are_ordered_by_coordinate(topology, axes):
    groups = topology.groups(axes)
    assert sorted(rank for group in groups for rank in group) == list(range(topology.world_size))
    for group in groups:
        places = [topology.coordinates(rank) for rank in group]
        assert places == sorted(places)
        for axis in set(AXES) - set(axes):
            assert len({getattr(place, axis) for place in places}) == 1
        assert all(topology.group(rank, axes) == group for rank in group)


@settings(deadline=None)
@given(topologies)
def test_the_right_most_axis_of_the_placement_varies_fastest(topology):
    order = topology.placement.split(",")
    for rank, places in enumerate(product(*(range(getattr(topology.degrees, axis)) for axis in order))):
        assert topology.coordinates(rank)._asdict() == dict(zip(order, places, strict=True))


@settings(deadline=None)
@given(topologies)
def test_ranks_with_one_data_rank_share_dp_and_sdp(topology):
    of_place = {}
    for rank in range(topology.world_size):
        place = topology.coordinates(rank)
        of_place.setdefault((place.dp, place.sdp), set()).add(topology.data_rank(rank))
    assert len(of_place) == topology.data_size
    assert sorted(of_place.values(), key=min) == [{number} for number in range(topology.data_size)]


def test_a_mesh_of_eight_as_drawn_in_the_design():
    topology = Topology({"pp": 2, "sdp": 2, "tp": 2})
    assert topology.world_size == 8 and topology.data_size == 2
    assert topology.coordinates(5) == Coordinates(pp=1, dp=0, sdp=0, cp=0, tp=1)
    assert topology.group(5, ("tp",)) == (4, 5)
    assert topology.group(5, ("pp",)) == (1, 5)
    assert topology.groups(("sdp", "dp")) == ((0, 2), (1, 3), (4, 6), (5, 7))
    assert [topology.data_rank(rank) for rank in range(8)] == [0, 0, 1, 1, 0, 0, 1, 1]
    spread = Topology(topology.degrees, "tp, sdp, dp, cp, pp")
    assert spread.group(0, ("pp",)) == (0, 1)
    assert spread == Topology(Degrees(pp=2, sdp=2, tp=2), "tp,sdp,dp,cp,pp")
    assert spread != topology


def test_thousands_of_ranks_are_quick():
    topology = Topology(Degrees(pp=16, dp=8, sdp=16, cp=1, tp=8))
    assert len(topology.groups(("tp",))) == 2048
    assert all(topology.group(rank, ("sdp",))[0] <= rank for rank in range(0, 16384, 64))
    assert np.array_equal(topology.mesh().ravel(), np.arange(16384))


def test_the_mesh_cannot_be_written_to():
    with pytest.raises(ValueError, match="read-only"):
        Topology(Degrees(tp=2)).mesh()[0] = 1


@pytest.mark.parametrize(
    ("degrees", "placement", "field"),
    [
        ({"pp": 0}, "pp,dp,sdp,cp,tp", "pp"),
        ({"ep": 2}, "pp,dp,sdp,cp,tp", "ep"),
        ({"pp": 2}, "pp,dp,sdp,tp", "placement"),
        ({"pp": 2}, "pp,pp,dp,sdp,tp", "placement"),
    ],
)
def test_a_mesh_that_cannot_be_is_refused_by_field(degrees, placement, field):
    with pytest.raises(ConfigError) as caught:
        Topology(degrees, placement)
    assert [problem.field for problem in caught.value.problems] == [field]


def test_ranks_coordinates_and_axes_outside_the_mesh_are_refused():
    topology = Topology(Degrees(tp=2))
    with pytest.raises(ValueError, match="rank 2 is outside the world of 2"):
        topology.coordinates(2)
    with pytest.raises(ValueError, match="outside the mesh"):
        topology.rank_of(Coordinates(tp=2))
    with pytest.raises(ValueError, match="unknown mesh axes"):
        topology.groups(("ep",))
