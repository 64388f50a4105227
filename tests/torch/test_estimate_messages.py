"""The estimate's messages and FLOPs against what PyTorch really sends and multiplies."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from mpsdk.backend import Place
from mpsdk.estimate import estimate
from mpsdk.initialise import RandomSource
from mpsdk.plan import Plan
from tests.cases import global_batch, rows_of
from tests.estimated import MESSAGES, SDP2, ZB_V, Sent, expected_messages
from tests.torch.cases import make_plan
from tests.torch.pool import WorkerPool
from tests.turns import named, one_in

# What torch.distributed's calls become, and which of their tensors is the payload: the last is what goes in.
COLLECTIVES = {
    "c10d.allreduce_.default": "all-reduce",
    "c10d._allgather_base_.default": "all-gather",
    "c10d._reduce_scatter_base_.default": "reduce-scatter",
    "c10d.send.default": "send",
}


class Recorder(TorchDispatchMode):
    """Counts the messages that are sent, and the FLOPs of matrix products, while it is on."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: Sent = Counter()
        self.matrix_flops = 0

    def __torch_dispatch__(
        self,
        func: Any,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented
        operation = str(func)
        if operation in COLLECTIVES:
            (group,) = (
                dist.ProcessGroup.unbox(a) for a in args if isinstance(a, torch.ScriptObject) and _is_group(a)
            )
            payload = [tensor for tensor in tree_iter(args) if isinstance(tensor, torch.Tensor)][-1]
            ranks = tuple(dist.get_process_group_ranks(group))
            self.sent[COLLECTIVES[operation], ranks, payload.nbytes] += 1
        elif operation.startswith("c10d.") and operation != "c10d.recv_.default":
            raise AssertionError(f"{operation} is not counted")
        elif operation in ("aten.mm.default", "aten.addmm.default", "aten.addmm_.default"):
            first, second = args[-2:]
            self.matrix_flops += 2 * first.shape[0] * first.shape[1] * second.shape[1]
        return func(*args, **(kwargs or {}))


def _is_group(script_object: Any) -> bool:
    return "ProcessGroup" in str(script_object._type())


def record(place: Place, plan: Plan) -> tuple[Sent, Sent, int]:
    """What this rank sends in a second step, what it sends to report it, and FLOPs of its matrix products."""
    from mpsdk_torch.backend import TorchBackend

    backend = TorchBackend()
    try:
        backend.build(plan, place)
        backend.load(RandomSource(plan.description, plan.training.seed))
        batch = global_batch(0, plan.description.vocab_size or 0, rows=plan.training.global_batch)
        batch = rows_of(batch, plan, place.rank)
        backend.step(batch, step=0, learning_rate=1e-3).read()
        with Recorder() as step:
            result = backend.step(batch, step=1, learning_rate=1e-3)
        with Recorder() as report:
            result.read()
        return step.sent, report.sent, step.matrix_flops
    finally:
        backend.close()


@pytest.mark.parametrize("case", one_in(2, named(MESSAGES)))
def test_messages_and_matrix_products_of_a_step(pool: WorkerPool, case: str) -> None:
    family, world_size, distribution, training = MESSAGES[case]
    plan = make_plan(family, world_size, distribution, **training)
    compute = estimate(plan, device="cpu").compute
    for rank, (step, report, flops) in enumerate(pool.run(world_size, record, plan)):
        assert step == expected_messages(plan, rank, "step"), rank
        assert report == expected_messages(plan, rank, "report"), rank
        passes = plan.microbatches * plan.training.accumulation
        stages = [compute[stage] for stage in plan.stages_of(rank)]
        assert flops == pytest.approx(
            passes * sum(3 * stage.linear + stage.linear_again for stage in stages), rel=1e-12
        )


def test_a_split_backward_reduces_at_most_what_the_estimate_says(pool: WorkerPool) -> None:
    """Of two backwards of inputs in a row, the first one's weights take the second one's biases and norms along."""
    plan = make_plan("gpt2", 4, ZB_V | SDP2)
    for rank, (step, _, _) in enumerate(pool.run(4, record, plan)):
        wanted = expected_messages(plan, rank, "step")
        sums = [sum(count * message[2] for message, count in sent.items()) for sent in (step, wanted)]
        assert 0.95 * sums[1] <= sums[0] <= sums[1], rank
        for sent in (step, wanted):
            for message in [message for message in sent if message[0] == "reduce-scatter"]:
                del sent[message]
        assert step == wanted, rank
