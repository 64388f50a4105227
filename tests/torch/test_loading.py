"""Loading a pretrained model takes a rank's part and one tensor, never the whole."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from mpsdk.backend import Place
from mpsdk.plan import Plan
from mpsdk_torch.backend import TorchBackend
from tests.loading import SLACK, bound, loading_plan, most_memory, open_source, whole, write_shards
from tests.torch.pool import WorkerPool


def memory_of_loading(place: Place, plan: Plan, directory: str) -> int:
    backend = TorchBackend()
    try:
        with most_memory() as most:
            backend.build(plan, place)
            backend.load(open_source(directory))
        return most[0]
    finally:
        backend.close()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc; runs on Linux, in `nox -s torch`")
def test_a_sharded_directory_is_loaded_in_the_memory_of_a_ranks_part_and_one_tensor(
    pool: WorkerPool, tmp_path: Path
) -> None:
    plan = loading_plan("torch")
    write_shards(tmp_path, plan)
    found = pool.run(plan.world_size, memory_of_loading, plan, str(tmp_path))
    for rank, most in enumerate(found):
        place = plan.topology.coordinates(rank)
        assert most <= bound(plan, place.pp, place.tp) + SLACK < whole(plan.description) / 2
