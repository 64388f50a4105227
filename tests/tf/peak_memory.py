"""Bytes that a training takes at its peak, in a process of its own: `python -m tests.tf.peak_memory SCHEDULE MICROBATCHES`."""

from __future__ import annotations

import resource
import sys

from tests.tf import ranks
from tests.tf.cases import make_plan, train_only

MODEL = {"n_embd": 128, "n_head": 4, "n_positions": 128}
MICROBATCH = 8


def peak(schedule: str, microbatches: int) -> int:
    """What two stages together, as threads, add to the process in two steps."""
    ranks.make_devices()
    plan = make_plan(
        "gpt2", 2, {"pipeline": {"degree": 2, "microbatches": microbatches, "schedule": schedule}},
        model=MODEL, sequence_length=128, global_batch=MICROBATCH * microbatches, accumulation=1,
    )  # fmt: skip
    before = _peak_so_far()
    ranks.run(2, train_only, plan, 2)
    return _peak_so_far() - before


def _peak_so_far() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    print(peak(sys.argv[1], int(sys.argv[2])))
