"""Bytes that 16 more rows in a microbatch add to a step's peak: `python -m tests.tf.memory_growth`."""

from __future__ import annotations

import resource

from mpsdk.plan import Plan
from tests.tf import ranks
from tests.tf.cases import make_plan, train_only

MODEL = {"n_embd": 256, "n_head": 4, "n_positions": 256, "vocab_size": 2048}


def plan_of(rows: int) -> Plan:
    return make_plan("gpt2", 1, {}, model=MODEL, sequence_length=256, global_batch=rows, accumulation=1)


def growth() -> int:
    """What a second training of 32 rows adds to the peak of one of 16: TensorFlow itself is in both."""
    ranks.make_devices()
    ranks.run(1, train_only, plan_of(16), 2)
    before = _peak()
    ranks.run(1, train_only, plan_of(32), 2)
    return _peak() - before


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    print(growth())
