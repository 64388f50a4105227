"""Loading a pretrained model takes a rank's part and one tensor, never the whole. Ranks are processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.loading import SLACK, SMALL, bound, loading_plan, whole, write_shards

pytestmark = pytest.mark.processes


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc; runs on Linux, in `nox -s tf`")
def test_a_sharded_directory_is_loaded_in_the_memory_of_a_ranks_part_and_one_tensor(tmp_path: Path) -> None:
    plan = loading_plan("tensorflow")
    small, large = tmp_path / "small", tmp_path / "large"
    write_shards(small, loading_plan("tensorflow", **SMALL))
    write_shards(large, plan)
    command = (sys.executable, "-m", "tests.tf.loading_memory")
    # Allocators that give back at once what is let go: glibc's, and TensorFlow's without oneDNN, whose pool keeps it.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(1 << 20), "TF_ENABLE_ONEDNN_OPTS": "0"}
    ranks = [
        subprocess.Popen(
            [*command, str(rank), *map(str, (tmp_path / "store", small, large))],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(plan.world_size)
    ]
    try:
        answers = [rank.communicate(timeout=240)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    for rank, answer in enumerate(answers):
        place = plan.topology.coordinates(rank)
        assert int(answer) <= bound(plan, place.pp, place.tp) + SLACK < whole(plan.description) / 2
