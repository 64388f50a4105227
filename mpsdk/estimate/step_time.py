"""StepTime: how long a step takes, and what for.

The pipeline is the schedule's simulation in seconds, messages between stages included. Before and after it come what waits
for all of it: the count of tokens, gradients of tied and replicated tensors, the norm, and the update.

Where more ranks share a CPU than it has cores, a rank that waits leaves its core to others. So two steps are reckoned, and
the longer one holds: every rank at the speed of a core of its own, waiting as the schedule says; and every rank at the speed
of all being busy at once, with no waiting at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from mpsdk.estimate.account import Account
from mpsdk.estimate.communication import Message, messages_of
from mpsdk.estimate.devices import DeviceFigures, Speeds
from mpsdk.estimate.links import Links
from mpsdk.estimate.sizes import FP32
from mpsdk.estimate.stage_time import Moment, StageClock, StageTime
from mpsdk.estimate.states import moments
from mpsdk.plan import Plan
from mpsdk.schedule import Costs, simulate

SCALARS = "scalars"
_AFTER = ("gradients of tied tensors", "gradients of replicated tensors", "count of tokens", "gradient norm")


@dataclass(frozen=True)
class StepTime:
    """The seconds of one step, which add up: `seconds` is `compute`, `exposed`, `bubble` and `update` together.

    `compute`: of an average pipeline rank. `exposed`: messages that nothing hides, by mesh axis, and "scalars".
    `bubble`: waiting for other stages. `update`: norm and optimizer of the slowest rank. `mfu`: FLOPs that the model asks
    for (`Estimate.model_flops`) over what all devices could do at their peak in that time.
    """

    device: str
    seconds: float
    compute: float
    exposed: dict[str, float]
    bubble: float
    update: float
    tokens_per_second: float
    mfu: float

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return asdict(self)

    @property
    def shares(self) -> str:
        """What the step is spent on, in percent; what takes next to nothing is left out."""
        parts = {"compute": self.compute, **self.exposed, "bubble": self.bubble, "update": self.update}
        return ", ".join(
            f"{name} {share:.1%}"
            for name, seconds in parts.items()
            if (share := seconds / self.seconds) > 0.0005
        )

    def __str__(self) -> str:
        return (
            f"{self.seconds:.4g} s a step on {self.device}, {self.tokens_per_second:,.0f} tokens/s, "
            f"MFU {self.mfu:.1%} ({self.shares})"
        )


@dataclass(frozen=True)
class _Pass:
    """The pipeline part of a step: its makespan, and of an average rank what it computes and what messages add."""

    makespan: float
    compute: float
    exposed: dict[str, float]


def step_time(plan: Plan, figures: DeviceFigures, *, model_flops: float) -> StepTime:
    """How long a step of `plan` takes on devices of `figures`. Raises ConfigError where these lack a figure."""
    ranks = figures.ranks_on_node(plan.world_size)
    crowded = figures.at(ranks)
    links = Links(plan.topology, figures, crowded)
    accounts = [Account(plan, figures.kind, pp) for pp in range(plan.degrees.pp)]
    done = _pipeline(plan, accounts, figures, crowded, links)
    if figures.cores is not None and ranks > figures.cores:
        busy = done.compute + sum(done.exposed.values())
        apart = _pipeline(plan, accounts, figures, figures.at(figures.cores), links)
        done = apart if apart.makespan > busy else _Pass(busy, done.compute, done.exposed)
    after = _after(accounts, links)
    update = max(_update(account, crowded) for account in accounts)
    waits = done.exposed | after
    seconds = done.makespan + sum(after.values()) + update
    devices = plan.world_size / figures.sharing(ranks)
    peak = figures.peak_flops.get(plan.distribution.precision.mode)
    return StepTime(
        device=figures.name,
        seconds=seconds,
        compute=done.compute,
        exposed={axis: spent for axis, spent in waits.items() if spent > 0},
        bubble=max(0.0, done.makespan - done.compute - sum(done.exposed.values())),
        update=update,
        tokens_per_second=plan.tokens_per_step / seconds,
        mfu=model_flops / (seconds * devices * peak) if peak else 0.0,
    )


def _pipeline(
    plan: Plan, accounts: Sequence[Account], figures: DeviceFigures, speeds: Speeds, links: Links
) -> _Pass:
    clocks = [StageClock(account, figures, speeds, links) for account in accounts]
    times = [clocks[pp].time(stage) for stage, pp in enumerate(plan.schedule.stage_rank)]
    sizes = accounts[0].sizes
    send = Message(("pp",), "send", "hidden states", 2, sizes.hidden if sizes else 0, 1)
    message = links.seconds(send) if plan.degrees.pp > 1 and sizes else 0.0
    passes = plan.training.accumulation
    ranks, backwards = plan.degrees.pp, plan.microbatches * passes
    makespan = passes * _makespan(plan, times, message) + _once(plan, times)
    exposed = {"tp": 0.0, "sdp": 0.0, "dp": 0.0}
    for time in times:
        often: tuple[tuple[Moment, int], ...] = (
            ("first forward", 1),
            ("forward", backwards - 1),
            ("backward", backwards - 1),
            ("last backward", 1),
        )
        for moment, how_often in often:
            for axis, seconds in time.exposed[moment].items():
                exposed[axis] += how_often * seconds / ranks
    compute = sum(time.forward + time.backward for time in times) * backwards / ranks
    return _Pass(makespan, compute, exposed)


def _once(plan: Plan, times: Sequence[StageTime]) -> float:
    """Seconds that a step's first forwards and last backwards add to those of any microbatch.

    The first microbatch meets them at every stage on its way down, the last one on its way up. A split backward reduces
    with the gradients of weights, which no other stage waits for.
    """
    first = sum(time.waits("first forward") - time.waits("forward") for time in times)
    last = [time.waits("last backward") - time.waits("backward") for time in times]
    if not plan.schedule.splits_backward:
        return first + sum(last)
    of_rank = [0.0] * plan.degrees.pp
    for stage, pp in enumerate(plan.schedule.stage_rank):
        of_rank[pp] += last[stage]
    return first + max(of_rank)


def _makespan(plan: Plan, times: Sequence[StageTime], message: float) -> float:
    """One pass over the microbatches, in seconds."""
    costs = Costs(
        forward=[time.forward + time.waits("forward") for time in times],
        backward=[time.backward + time.waits("backward") for time in times],
        backward_input=[time.backward_input + time.exposed["backward"]["tp"] for time in times],
        backward_weight=[
            time.backward_weight + time.exposed["backward"]["sdp"] + time.exposed["backward"]["dp"]
            for time in times
        ],
        communication=message,
    )
    return simulate(plan.schedule, costs).makespan


def _after(accounts: Sequence[Account], links: Links) -> dict[str, float]:
    """Seconds of the messages around the pipeline, by axis, of the rank that has most of each."""
    most: dict[str, float] = {}
    for account in accounts:
        found: dict[str, float] = {}
        for message in messages_of(account, account.shares[0]):
            if message.purpose in _AFTER:
                axis = f"{message.axes[0]} sums" if len(message.axes) == 1 else SCALARS
                found[axis] = found.get(axis, 0.0) + links.seconds(message)
        most = {axis: max(most.get(axis, 0.0), found.get(axis, 0.0)) for axis in {*most, *found}}
    return dict(sorted(most.items()))


def _update(account: Account, speeds: Speeds) -> float:
    """Seconds of the norm and of the optimizer over the largest share: weights, gradients and moments read and written."""
    share = account.shares[0]
    each = FP32 * (3 + 2 * moments(account.plan.training))
    launch = 4 * share.tensors * speeds.kernel_seconds
    norm = FP32 * share.elements / speeds.memory_bandwidth
    return each * share.elements / speeds.update_bandwidth + norm + launch
