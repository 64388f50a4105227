from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mpsdk.errors import ConfigError
from mpsdk.launch.environment import (
    generation_from_environment,
    new_generation,
    place_from_environment,
    run_directory_from_environment,
    worker_environment,
)


def test_what_the_launcher_writes_is_what_the_worker_reads():
    environment = worker_environment(
        rank=2,
        world_size=4,
        run_directory=Path("/runs/a"),
        generation="g-1",
        timeout=12.5,
        store=Path("/runs/a/store"),
    )
    place = place_from_environment(environment)
    assert place is not None
    assert (place.rank, place.world_size, place.local_rank) == (2, 4, 2)
    assert (place.store, place.timeout) == ("/runs/a/store", 12.5)
    assert run_directory_from_environment(environment) == Path("/runs/a")
    assert generation_from_environment(environment) == "g-1"


def test_without_a_launcher_there_is_no_place():
    assert place_from_environment({}) is None
    assert run_directory_from_environment({}) is None


def test_torchrun_is_a_launcher():
    place = place_from_environment(
        {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1"}
    )
    assert place is not None
    assert (place.rank, place.world_size, place.local_rank, place.store) == (5, 8, 1, None)


@pytest.mark.parametrize(
    ("environment", "field"),
    [
        ({"RANK": "0"}, "WORLD_SIZE"),
        ({"WORLD_SIZE": "2"}, "RANK"),
        ({"RANK": "x", "WORLD_SIZE": "2"}, "RANK"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MPSDK_TIMEOUT": "soon"}, "MPSDK_TIMEOUT"),
    ],
)
def test_half_an_environment_is_refused_with_the_variable(environment, field):
    with pytest.raises(ConfigError) as caught:
        place_from_environment(environment)
    assert [problem.field for problem in caught.value.problems] == [field]


def test_generations_differ_between_starts():
    assert len({new_generation() for _ in range(50)}) == 50


def test_generation_under_torchrun_is_equal_on_all_ranks_and_new_for_each_agent_and_restart():
    base = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "none"}
    first = [generation_from_environment({**base, "RANK": rank}) for rank in "01"]
    assert first[0] == first[1]
    assert generation_from_environment({**base, "TORCHELASTIC_RESTART_COUNT": "1"}) != first[0]
    program = "from mpsdk.launch.environment import *; print(generation_from_environment())"
    other_agent = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, **base, "RANK": "0"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    assert other_agent and other_agent != first[0]


def test_several_machines_need_a_run_id_of_their_own():
    base = {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "RANK": "0"}
    assert generation_from_environment({**base, "TORCHELASTIC_RUN_ID": "job/7"}) == "job_7-0"
    for environment in ({**base, "TORCHELASTIC_RUN_ID": "none"}, base):
        with pytest.raises(ConfigError, match="MPSDK_GENERATION"):
            generation_from_environment(environment)
