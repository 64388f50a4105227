"""Schedules run by ranks that know nothing of each other, with random delays, against one process."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpsdk.schedule import GENERATORS
from tests.core.schedule.cases import Toy, evaluation_of, schedules


@pytest.mark.parametrize("room", [None, 1], ids=["buffered", "rendezvous"])
@settings(max_examples=60, deadline=None)
@given(schedule=schedules(tuple(GENERATORS)), seed=st.integers(0, 2**32))
def test_any_delay_gives_the_gradient_of_one_process(schedule, seed, room):
    toy = Toy(schedule, Random(seed), room=room)
    toy.run()
    toy.check()


@pytest.mark.parametrize("room", [None, 1], ids=["buffered", "rendezvous"])
@settings(max_examples=30, deadline=None)
@given(schedule=schedules().map(evaluation_of), seed=st.integers(0, 2**32))
def test_evaluation_gives_the_outputs_of_one_process(schedule, seed, room):
    toy = Toy(schedule, Random(seed), room=room)
    toy.run()
    toy.check()
