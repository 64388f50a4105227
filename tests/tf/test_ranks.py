"""The harness itself: what a failing rank does to a case, and to the cases after it."""

from __future__ import annotations

import time

import pytest
import tensorflow as tf

from mpsdk.backend import Place
from tests.tf import ranks


def summed(place: Place, failing: int | None) -> float:
    if place.rank == failing:
        raise ArithmeticError("planted: the rank's own message")
    with tf.device(f"CPU:{place.local_rank}"):
        total = tf.raw_ops.CollectiveReduceV2(
            input=tf.constant(float(place.rank)),
            group_size=place.world_size,
            group_key=abs(hash(place.store)) % (1 << 30),
            instance_key=1,
            ordering_token=[],
            merge_op="Add",
            final_op="Id",
            timeout_seconds=place.timeout,
        )
    return float(total)


def test_a_rank_that_raises_frees_the_others_and_leaves_the_next_case_unharmed() -> None:
    assert ranks.run(4, summed, None) == [6.0] * 4
    started = time.monotonic()
    with pytest.raises(ranks.CaseError) as caught:
        ranks.run(4, summed, 2)
    assert time.monotonic() - started < ranks.COLLECTIVE_TIMEOUT / 2
    message = str(caught.value)
    assert message.startswith("rank 2:\n")
    assert message.index("ArithmeticError: planted") < message.index("rank 0:")
    assert ranks.run(8, summed, None) == [28.0] * 8
