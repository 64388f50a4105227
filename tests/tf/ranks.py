"""Ranks as threads of this process, each on a logical device of its own: a case of eight ranks starts at once.

Importing TensorFlow takes seconds and 500 MB a process. Collectives between logical devices run the same kernels under
the same keys as those between processes; what only processes can show (a rank that dies, the rendezvous) has tests of
its own.
"""

from __future__ import annotations

import gc
import itertools
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

import tensorflow as tf
from tensorflow.python.eager import context  # to begin anew after a failure, as TensorFlow's own tests do

from mpsdk.backend import Place

MOST_RANKS = 8
CASE_TIMEOUT = 240.0  # seconds; a case takes a few, on a busy machine
COLLECTIVE_TIMEOUT = (
    120.0  # seconds, for a program with all that its ranks wait; one that fails frees the others at once
)
_ABORTED = 10  # a status code

_numbers = itertools.count(1)


class CaseError(AssertionError):
    """A case raised on some rank; the traceback of the first to fail comes first."""


def make_devices() -> None:
    """Give this process its logical devices. Has to come before anything else that TensorFlow does."""
    (cpu,) = tf.config.list_physical_devices("CPU")
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * MOST_RANKS)
    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(2 * MOST_RANKS)
    tf.config.optimizer.set_experimental_options({"disable_meta_optimizer": True})
    assert len(tf.config.list_logical_devices("CPU")) == MOST_RANKS


class _Rank(threading.Thread):
    """One rank of a case, what it returned or raised and when, and what it said last that it was about to do."""

    def __init__(self, place: dict[str, Any], case: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        super().__init__(name=f"rank {place['rank']}", daemon=True)
        self.place = Place(**place, note=self._note)
        self.case, self.arguments = case, arguments
        self.answer: Any = None
        self.failure: tuple[float, str] | None = None
        self.activity = "starting"

    def run(self) -> None:
        try:
            self.answer = self.case(self.place, *self.arguments)
        except Exception:
            self.failure = time.monotonic(), f"{self.name}:\n{traceback.format_exc()}"
            context.context().abort_collective_ops(_ABORTED, f"{self.name} failed")  # nobody need wait for it

    def _note(self, activity: str) -> None:
        self.activity = activity

    def where(self) -> str:
        frame = sys._current_frames().get(self.ident or 0)
        stack = "".join(traceback.format_stack(frame)) if frame is not None else ""
        return f"{self.name} gave no answer, last seen: {self.activity}\n{stack}"


def run(world_size: int, case: Callable[..., Any], *arguments: Any) -> list[Any]:
    """`case(place, *arguments)` on ranks 0 .. world_size - 1, and what each returned.

    Raises CaseError when a rank fails, or when one gives no answer in time.
    """
    store = f"case-{next(_numbers)}"
    ranks = []
    for rank in range(world_size):
        place = {"rank": rank, "local_rank": rank, "world_size": world_size}
        ranks.append(_Rank(place | {"store": store, "timeout": COLLECTIVE_TIMEOUT}, case, arguments))
    for rank in ranks:
        rank.start()
    end = time.monotonic() + CASE_TIMEOUT
    for rank in ranks:
        rank.join(max(0.0, end - time.monotonic()))
    failures = [failure for _, failure in sorted(rank.failure for rank in ranks if rank.failure)]
    failures += [rank.where() for rank in ranks if rank.is_alive()]
    answers = [rank.answer for rank in ranks]
    del ranks
    gc.collect()  # graphs and their functions hang in cycles
    if failures:
        context._reset_context()  # collectives that have failed once fail ever after
        make_devices()
        raise CaseError("\n".join(failures))
    return answers
