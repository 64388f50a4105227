"""Seconds of one microbatch's forward and backward at each stage, compute apart from messages that nothing hides.

Each matrix product takes its FLOPs at the rate of its size, attention likewise, memory-bound operations their bytes at the
memory's bandwidth. On a GPU, which queues, a stage takes that or the time to launch its operations, whichever is longer;
on a CPU, which does one thing after another, both.

What hides: collectives of tensor parallelism nothing. Gathering and reducing of data parallelism, on a GPU, the compute of
the same action, but for the first unit gathered and the last one reduced, which have no compute beside them. On a CPU
nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from mpsdk.estimate.account import Account
from mpsdk.estimate.communication import Message, region_messages
from mpsdk.estimate.compute import stage_compute
from mpsdk.estimate.devices import DeviceFigures, Rate, Speeds, rate_at, rates_of
from mpsdk.estimate.links import Links
from mpsdk.estimate.sizes import FP32
from mpsdk.estimate.traffic import Work, gather_work, reduce_work, stage_work

# A fused kernel makes its scores again in the backward: five products for the forward's two (arXiv:2307.08691, 3.1.2).
_FUSED_BACKWARD = 2.5
_CAUSAL_HALF = 0.5

Moment = Literal["first forward", "forward", "backward", "last backward"]


@dataclass(frozen=True)
class StageTime:
    """Seconds at `stage`. `compute`: of a forward, and of a backward's two parts. `exposed`: by moment and axis, what
    messages add to it; the first forward and the last backward of a step are moments of their own."""

    stage: int
    forward: float
    backward_input: float
    backward_weight: float
    exposed: dict[Moment, dict[str, float]] = field(default_factory=dict[Moment, dict[str, float]])

    @property
    def backward(self) -> float:
        return self.backward_input + self.backward_weight

    def waits(self, moment: Moment) -> float:
        """Seconds that messages add to the action of this moment."""
        return sum(self.exposed[moment].values())


@dataclass(frozen=True)
class _Rates:
    matmul: Sequence[Rate]
    attention: Sequence[Rate]


class StageClock:
    """Times the stages of one pipeline rank.

    Args:
        account: the rank.
        figures: of the device.
        speeds: of compute.
        links: what carries the messages.
    """

    def __init__(self, account: Account, figures: DeviceFigures, speeds: Speeds, links: Links) -> None:
        self.account, self.figures, self.speeds, self.links = account, figures, speeds, links
        precision = account.plan.distribution.precision.mode
        self.rates = _Rates(
            rates_of(figures, speeds.matmul, precision), rates_of(figures, speeds.attention, precision)
        )

    def time(self, stage: int) -> StageTime:
        """The seconds of `stage`."""
        compute, work = stage_compute(self.account, stage), stage_work(self.account, stage)
        linear, attention = self._linear(stage), self._attention(stage)
        again = linear * _part(compute.linear_again, compute.linear)
        again += attention * _part(compute.attention_again, compute.attention)
        of_attention = _FUSED_BACKWARD if self.account.attention == "fused" else 2.0
        return StageTime(
            stage=stage,
            forward=self._seconds(linear + attention, work.forward),
            backward_input=self._seconds(
                linear + of_attention * attention + again, work.again + work.backward_input
            ),
            backward_weight=self._seconds(linear, work.backward_weight),
            exposed=self._exposed(stage, forward=linear + attention, backward=2 * linear + again),
        )

    # -- compute ----------------------------------------------------------------------------------------------------

    def _linear(self, stage: int) -> float:
        """Seconds of the matrix products of a forward."""
        account, plan = self.account, self.account.plan
        model = plan.description
        tokens = plan.microbatch_size * plan.training.sequence_length
        each = {
            kind: sum(
                self._product(2.0 * tokens * tensor.elements / plan.degrees.tp)
                for tensor in tensors
                if len(tensor.shape) == 2 and tensor.role in ("column", "row")
            )
            for kind, tensors in model.kinds.items()
        }
        seconds = sum(each[kind] for kind in account.block_kinds(stage))
        if account.is_last(stage):
            padded = plan.padded_vocab_size / (model.vocab_size or 1)
            seconds += sum(
                self._product(2.0 * tokens * tensor.elements * padded / plan.degrees.tp)
                for tensor in model.head
                if tensor.role == "vocab"
            )
        return seconds

    def _product(self, flops: float) -> float:
        return flops / rate_at(self.rates.matmul, flops)

    def _attention(self, stage: int) -> float:
        flops, blocks = stage_compute(self.account, stage).attention, self.account.blocks(stage)
        if not flops:
            return 0.0
        if self.account.attention == "fused":
            flops *= _CAUSAL_HALF
        return flops / rate_at(self.rates.attention, flops / blocks)

    def _seconds(self, compute: float, work: Work) -> float:
        busy = compute + work.bytes / self.speeds.memory_bandwidth
        launch = work.kernels * self.speeds.kernel_seconds
        return max(busy, launch) if self.figures.asynchronous else busy + launch

    # -- messages ---------------------------------------------------------------------------------------------------

    def _exposed(self, stage: int, *, forward: float, backward: float) -> dict[Moment, dict[str, float]]:
        """By moment and axis. `forward`, `backward`: seconds of compute that may hide messages."""
        regions = {"forward": 0.0, "backward": 0.0}
        if self.account.sizes is not None and self.account.plan.degrees.tp > 1:
            for phase, message in region_messages(self.account, self.account.sizes, stage):
                regions[phase] += self.links.seconds(message)
        gathers, reduces, replicas = self._units(stage)
        block = self.account.sharding.gathers == "block"
        every = self.account.reduces_each and self.account.sharding.shares_gradients
        each_forward = gathers if block else []
        again = [
            seconds
            for number, (unit, seconds) in enumerate(zip(self.account.units[stage], gathers, strict=True))
            if unit.kind != "embedding" and not self.account.turns(stage, number)
        ]
        each_backward = again[::-1] if block else []

        def of(moment: Moment) -> dict[str, float]:
            if moment.endswith("forward"):
                sharding = gathers if moment == "first forward" else each_forward
                return {"tp": regions["forward"], "sdp": self._left(sharding, [], forward), "dp": 0.0}
            last = moment == "last backward"
            reductions = reduces if last or every else []
            alone = self._left(each_backward, reductions, backward)
            summed = [one + other for one, other in zip(reduces, replicas, strict=True)]
            both = self._left(each_backward, summed, backward) if last else alone
            return {"tp": regions["backward"], "sdp": alone, "dp": both - alone}

        moments: tuple[Moment, ...] = ("first forward", "forward", "backward", "last backward")
        return {moment: of(moment) for moment in moments}

    def _units(self, stage: int) -> tuple[list[float], list[float], list[float]]:
        """Seconds of gathering each unit, of reducing it over shards, and of reducing it over replicas, in the order of
        the forward and of the backward."""
        account, degrees = self.account, self.account.plan.degrees
        n, replicas = account.degree, degrees.dp
        dtype = account.compute if account.sharding.shares_parameters else FP32
        gathers: list[float] = []
        reduces: list[float] = []
        summed: list[float] = []
        for unit in account.units[stage]:
            part = unit.padded(n) // n
            gather = Message(("sdp",), "all-gather", "", n, part * dtype, 1)
            reduce = Message(("sdp",), "reduce-scatter", "", n, part * n * FP32, 1)
            replica = Message(("dp",), "all-reduce", "", replicas, part * FP32, 1)
            gathers.append(self._message(gather) + self._seconds(0.0, gather_work(account, unit)))
            reduces.append(self._message(reduce) + self._seconds(0.0, reduce_work(account, unit)))
            summed.append(self._message(replica))
        return gathers, reduces[::-1], summed[::-1]

    def _message(self, message: Message) -> float:
        return self.links.seconds(message) if message.ranks > 1 else 0.0

    def _left(self, gathers: Sequence[float], reduces: Sequence[float], compute: float) -> float:
        """Seconds of these that no compute hides, in the order in which they come."""
        total = sum(gathers) + sum(reduces)
        if not self.figures.asynchronous:
            return total
        ends = (gathers[0] if gathers else 0.0) + (reduces[-1] if reduces else 0.0)
        return ends + max(0.0, total - ends - compute)


def _part(some: float, all_of_it: float) -> float:
    return some / all_of_it if all_of_it else 0.0
