"""Partition against brute force over all ways to cut."""

from __future__ import annotations

from itertools import accumulate, combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpsdk.errors import ConfigError
from mpsdk.partition import Cost, partition_blocks

FREE = Cost(0, 0)
costs = st.builds(
    Cost, compute=st.integers(0, 50).map(float) | st.floats(0, 1e3), memory=st.integers(0, 50).map(float)
)


def stage_costs(counts, blocks, embedding, head, weight, in_flight):
    """The definition, written out once more."""
    mean = sum(in_flight) / len(in_flight)
    all_compute = sum(cost.compute for cost in (*blocks, embedding, head)) or 1
    all_memory = sum(cost.memory for cost in (*blocks, embedding, head)) or 1
    result = []
    for stage, stop in enumerate(accumulate(counts)):
        mine = blocks[stop - counts[stage] : stop]
        compute = sum(cost.compute for cost in mine)
        memory = sum(cost.memory for cost in mine) * in_flight[stage] / mean
        for there, extra in ((stage == 0, embedding), (stage == len(counts) - 1, head)):
            compute += there * extra.compute
            memory += there * extra.memory
        result.append((1 - weight) * compute / all_compute + weight * memory / all_memory)
    return result


def every_partition(blocks: int, stages: int):
    for cuts in combinations(range(1, blocks), stages - 1):
        yield tuple(stop - start for start, stop in zip((0, *cuts), (*cuts, blocks), strict=True))


@settings(max_examples=150, deadline=None)
@given(
    st.data(),
    st.lists(costs, min_size=1, max_size=9),
    costs,
    costs,
    st.sampled_from([0.0, 0.3, 0.5, 1.0]),
    st.booleans(),
)
def test_partition_is_as_good_as_the_best_of_all(data, blocks, embedding, head, weight, with_in_flight):
    stages = data.draw(st.integers(1, len(blocks)))
    in_flight = (
        data.draw(st.lists(st.floats(0.5, 8), min_size=stages, max_size=stages)) if with_in_flight else None
    )
    counts = partition_blocks(
        blocks, stages, embedding=embedding, head=head, memory_weight=weight, in_flight=in_flight
    )
    assert len(counts) == stages and sum(counts) == len(blocks) and min(counts) >= 1

    def cost(counts):
        return stage_costs(counts, blocks, embedding, head, weight, in_flight or [1.0] * stages)

    candidates = [
        (max(values), sum(value**2 for value in values))
        for values in map(cost, every_partition(len(blocks), stages))
    ]
    largest, squares = max(cost(counts)), sum(value**2 for value in cost(counts))
    best = min(candidates)[0]
    assert largest == pytest.approx(best, abs=1e-10)
    evenest = min(squares for largest, squares in candidates if largest <= best + 1e-13)
    assert squares <= evenest + 1e-5


def test_even_blocks_leave_the_early_stages_smaller():
    assert partition_blocks([Cost(1, 1)] * 10, 4, embedding=FREE, head=FREE, memory_weight=0.5) == (
        2,
        2,
        3,
        3,
    )


def test_embedding_and_head_take_blocks_off_their_stages():
    blocks = [Cost(1, 1)] * 12
    assert partition_blocks(blocks, 4, embedding=FREE, head=Cost(2, 0), memory_weight=0.0) == (3, 3, 4, 2)
    assert partition_blocks(blocks, 4, embedding=Cost(2, 0), head=FREE, memory_weight=0.0) == (1, 3, 4, 4)


def test_only_the_share_of_the_whole_counts():
    heavy = [Cost(300, 7e9)] * 12
    assert partition_blocks(heavy, 4, embedding=FREE, head=Cost(600, 0), memory_weight=0.0) == (3, 3, 4, 2)


def test_stages_with_more_in_flight_get_fewer_blocks_when_memory_counts():
    blocks = [Cost(1, 1)] * 16
    even = partition_blocks(blocks, 4, embedding=FREE, head=FREE, memory_weight=1.0)
    uneven = partition_blocks(blocks, 4, embedding=FREE, head=FREE, memory_weight=1.0, in_flight=(4, 3, 2, 1))
    compute = partition_blocks(
        blocks, 4, embedding=FREE, head=FREE, memory_weight=0.0, in_flight=(4, 3, 2, 1)
    )
    assert even == compute == (4, 4, 4, 4)
    assert uneven == tuple(sorted(uneven)) and uneven[0] < uneven[-1]


def test_blocks_that_cost_nothing_are_partitioned_too():
    counts = partition_blocks([FREE] * 5, 3, embedding=FREE, head=FREE, memory_weight=0.5)
    assert counts == (1, 1, 3)


def test_a_thousand_blocks_over_64_stages_are_even():
    counts = partition_blocks([Cost(0.1, 0.7)] * 1000, 64, embedding=FREE, head=FREE, memory_weight=0.5)
    assert counts == (15,) * 24 + (16,) * 40


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"stages": 4}, "stages"),
        ({"stages": 0}, "stages"),
        ({"memory_weight": 1.5}, "memory_weight"),
        ({"in_flight": (1, 2, 3)}, "in_flight"),
        ({"in_flight": (0, 2)}, "in_flight"),
        ({"head": Cost(-1, 0)}, "costs"),
    ],
)
def test_what_cannot_be_partitioned_is_refused_by_field(changes, field):
    arguments = {"stages": 2, "embedding": FREE, "head": FREE, "memory_weight": 0.5} | changes
    with pytest.raises(ConfigError) as caught:
        partition_blocks([Cost(1, 1)] * 3, **arguments)
    assert field in [problem.field for problem in caught.value.problems]
