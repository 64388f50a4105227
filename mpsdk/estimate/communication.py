"""Messages of one step, of every rank: which collective, over which axes, how many, how large.

Bytes of a message are its payload: the buffer that one rank hands to the call (its own part for an all-gather, the whole
for an all-reduce and a reduce-scatter, the tensor of a send). Bytes on the wire are what a rank then sends in a ring
over n ranks (Thakur et al. 2005; Patarasu and Yuan 2009, doi:10.1016/j.jpdc.2008.09.002): (n-1) payloads for an
all-gather, (n-1)/n for a reduce-scatter, 2(n-1)/n for an all-reduce, one for a send. Receives are not counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from mpsdk.estimate.account import Account
from mpsdk.estimate.sizes import FP32, Sizes
from mpsdk.estimate.states import ShareClass
from mpsdk.schedule import Kind

Collective = Literal["all-gather", "reduce-scatter", "all-reduce", "send"]
Axes = tuple[str, ...]
Phase = Literal["forward", "backward"]

COUNT_BYTES = 8  # the count of tokens is fp64, which holds any count exactly


@dataclass(frozen=True)
class Message:
    """`count` messages a step that are alike, over `ranks` ranks along `axes`, each with a payload of `bytes`.

    `every`: "report" for those of a step whose loss is read, which come on top.
    """

    axes: Axes
    collective: Collective
    purpose: str
    ranks: int
    bytes: int
    count: int
    every: Literal["step", "report"] = "step"

    @property
    def payload(self) -> int:
        """Bytes that a rank hands over in a step."""
        return self.count * self.bytes

    @property
    def wire(self) -> int:
        """Bytes that a rank sends in a step when collectives are rings."""
        n = self.ranks
        times = {"all-gather": n - 1, "reduce-scatter": (n - 1) / n, "all-reduce": 2 * (n - 1) / n, "send": 1}
        return round(self.payload * times[self.collective])


def messages_of(account: Account, share: ShareClass) -> tuple[Message, ...]:
    """The messages of one rank in a step: those of a step, then those of a report."""
    sizes = account.sizes
    found: list[Message] = []
    if sizes is not None:
        found += _tensor_parallel(account, sizes)
        found += _pipeline(account, sizes)
    found += _sharded(account)
    found += _update(account, share)
    found += _scalars(account)
    alike: Counter[Message] = Counter()
    for message in found:
        if message.ranks > 1 and message.bytes:
            alike[replace(message, count=0)] += message.count
    return tuple(replace(message, count=count) for message, count in alike.items() if count)


def region_messages(account: Account, sizes: Sizes, stage: int) -> Iterator[tuple[Phase, Message]]:
    """Entering and leaving each tensor-parallel region of one microbatch at `stage`, and the loss there: Korthikanti et
    al. 2022 (arXiv:2205.05198, figure 5) with sequence parallelism, Shoeybi et al. 2019 (arXiv:1909.08053, figure 3)
    without. What is computed again is part of the backward."""
    axes, t, blocks = ("tp",), sizes.tensor_parallel, account.blocks(stage)
    spec = account.plan.description.spec
    assert spec is not None
    last = account.is_last(stage)
    enter = 2 * blocks + (last and not spec.head.classifies)
    leave = 2 * blocks + account.is_first(stage)
    enter_again = leave_again = 0
    if account.recompute.mode != "none":
        enter_again = 2 * blocks
        leave_again = account.leaves_again * blocks
    gather = Message(axes, "all-gather", "hidden states", t, sizes.hidden, 1)
    scatter = Message(axes, "reduce-scatter", "hidden states", t, sizes.whole_hidden, 1)
    reduce = Message(axes, "all-reduce", "hidden states", t, sizes.whole_hidden, 1)
    if sizes.sequence_parallel:
        yield "forward", replace(gather, count=enter)
        yield "forward", replace(scatter, count=leave)
        yield "backward", replace(gather, count=leave + enter_again)
        yield "backward", replace(scatter, count=enter + leave_again)
    else:
        yield "forward", replace(reduce, count=leave)
        yield "backward", replace(reduce, count=enter + leave_again)
    if last and spec.head.classifies:
        summed = FP32 if sizes.sequence_parallel else 0
        yield "forward", Message(axes, "all-reduce", "sums of the loss", t, summed, 1)
    elif last:
        yield "forward", Message(axes, "all-reduce", "largest logits", t, sizes.tokens * FP32, 1)
        yield "forward", Message(axes, "all-reduce", "sums of the loss", t, 2 * sizes.tokens * FP32, 1)


def _tensor_parallel(account: Account, sizes: Sizes) -> Iterator[Message]:
    for stage in account.stages:
        for _, message in region_messages(account, sizes, stage):
            yield replace(message, count=message.count * account.backwards)


def _pipeline(account: Account, sizes: Sizes) -> Iterator[Message]:
    """Hidden states to the next stage and their gradients to the one before, as the schedule says."""
    plan = account.plan
    kinds = [action.kind for action in plan.schedule.actions[account.pp]]
    for kind, purpose in ((Kind.SEND_FORWARD, "hidden states"), (Kind.SEND_BACKWARD, "gradients")):
        count = kinds.count(kind) * plan.training.accumulation
        yield Message(("pp",), "send", purpose, 2, sizes.hidden, count)


def _sharded(account: Account) -> Iterator[Message]:
    """Gathering weights and reducing gradients, unit by unit (docs of FSDP2; Rajbhandari et al. 2019, arXiv:1910.02054)."""
    n, replicas, sharding = account.degree, account.plan.degrees.dp, account.sharding
    dtype = account.compute if sharding.shares_parameters else FP32
    reductions = account.backwards if sharding.shares_gradients else 1
    for stage, units in account.units.items():
        for number, unit in enumerate(units):
            gathers = 1
            if sharding.gathers == "block":  # in forwards and, unless whole still, in backwards
                stays = account.is_looked_up(unit) or account.turns(stage, number)
                gathers = account.backwards * (1 if stays else 2)
                gathers += account.gathers_in_vain(stage) if number == len(units) - 1 else 0
            part = unit.padded(n) // n
            yield Message(("sdp",), "all-gather", f"weights of {unit.kind}", n, part * dtype, gathers)
            yield Message(
                ("sdp",), "reduce-scatter", f"gradients of {unit.kind}", n, part * n * FP32, reductions
            )
            yield Message(("dp",), "all-reduce", f"gradients of {unit.kind}", replicas, part * FP32, 1)


def _update(account: Account, share: ShareClass) -> Iterator[Message]:
    """The flat sums before an update: the two copies of a tied tensor, and what sequence parallelism has split."""
    tied, replicated = account.flat(share)
    yield Message(("pp",), "all-reduce", "gradients of tied tensors", 2, tied * FP32, 1)
    t = account.plan.degrees.tp
    yield Message(("tp",), "all-reduce", "gradients of replicated tensors", t, replicated * FP32, 1)


def _scalars(account: Account) -> Iterator[Message]:
    degrees, world = account.plan.degrees, account.plan.world_size
    model = degrees.pp * degrees.sdp * degrees.tp
    yield Message(("dp", "sdp"), "all-reduce", "count of tokens", account.plan.data_size, COUNT_BYTES, 1)
    yield Message(("pp", "sdp", "tp"), "all-reduce", "gradient norm", model, FP32, 1)
    everyone = ("pp", "dp", "sdp", "tp")
    yield Message(everyone, "all-reduce", "loss", world, FP32, 1, "report")
    yield Message(everyone, "all-reduce", "stop and memory", world, 2 * COUNT_BYTES, 1, "report")
