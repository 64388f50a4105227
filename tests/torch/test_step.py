"""What a step does not do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mpsdk.backend import Place
from mpsdk.initialise import RandomSource
from mpsdk.plan import Plan
from tests.cases import global_batch, rows_of
from tests.layouts import LAYOUTS
from tests.torch.cases import make_plan
from tests.torch.pool import WorkerPool

READS = {
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.is_nonzero.default,
    torch.ops.aten.item.default,
    torch.ops.aten.nonzero.default,
}


class CountReads(TorchDispatchMode):
    """Counts operations that hand a value of a tensor to Python: on a GPU, each would wait for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in READS
        return func(*args, **(kwargs or {}))


def count_reads(place: Place, plan: Plan) -> tuple[int, int]:
    """Reads during a step, and during the reading of its results."""
    from mpsdk_torch.backend import TorchBackend

    backend = TorchBackend()
    try:
        backend.build(plan, place)
        backend.load(RandomSource(plan.description, seed=0))
        batch = rows_of(global_batch(0, plan.description.vocab_size or 0), plan, place.rank)
        backend.step(batch, step=0, learning_rate=1e-3).read()
        with CountReads() as step:
            result = backend.step(batch, step=1, learning_rate=1e-3)
        with CountReads() as read:
            result.read()
        return step.count, read.count
    finally:
        backend.close()


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("layout", ["single", "sdp2-parameters", "pp2-tp2", "pp2-sdp2-tp2"])
def test_a_step_reads_nothing_back_from_the_device(pool: WorkerPool, layout: str, precision: str) -> None:
    world_size, distribution = LAYOUTS.get(layout, (1, {}))
    plan = make_plan("gpt2", world_size, distribution | {"precision": precision})
    for step, read in pool.run(world_size, count_reads, plan):
        assert step == 0
        assert read > 0, "the counter must see the reads that there are"
