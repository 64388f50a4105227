"""Estimate: memory, messages and FLOPs of every rank of a Plan, stored by coordinate."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, NamedTuple

from mpsdk.cost import forward_flops
from mpsdk.estimate.account import Account
from mpsdk.estimate.communication import Axes, Collective, Message, messages_of
from mpsdk.estimate.compute import StageCompute, stage_compute, timeline_of
from mpsdk.estimate.frameworks import Device
from mpsdk.estimate.memory import RankMemory, memory_of
from mpsdk.plan import Plan
from mpsdk.schedule import Timeline
from mpsdk.topology import Coordinates

UNKNOWN_WITHOUT_SPEC = (
    "activations and workspace",
    "messages of tensor parallelism and between stages",
    "FLOPs of attention",
)


@dataclass(frozen=True)
class Fit:
    """Whether the peak of every rank is at most `bytes_per_device`; `rank` is the first of the fullest. True if it fits."""

    fits: bool
    bytes_per_device: int
    rank: int
    peak: int
    peak_at: str

    def __bool__(self) -> bool:
        return self.fits

    def __str__(self) -> str:
        verdict = "fits" if self.fits else "does not fit"
        return (
            f"{verdict} in {self.bytes_per_device:,} bytes: rank {self.rank} peaks at {self.peak:,} bytes, "
            f"in the moment {self.peak_at!r}"
        )


class Total(NamedTuple):
    """Messages of a step, their payloads and what a ring sends of them, in bytes."""

    messages: int
    payload: int
    wire: int


@dataclass(frozen=True)
class RankMessages:
    """What the ranks at pipeline coordinate `pp` and sdp coordinates [start, stop) hand to collectives and sends."""

    pp: int
    sdp: tuple[int, int]
    messages: tuple[Message, ...]

    def of_step(self) -> tuple[Message, ...]:
        """Without those that only a report takes."""
        return tuple(message for message in self.messages if message.every == "step")

    def totals(self) -> dict[tuple[Axes, Collective], Total]:
        """The messages of a step by axes and collective."""
        found: dict[tuple[Axes, Collective], Total] = {}
        for message in self.of_step():
            key = message.axes, message.collective
            sent, payload, wire = found.get(key, Total(0, 0, 0))
            found[key] = Total(sent + message.count, payload + message.payload, wire + message.wire)
        return found

    @property
    def payload(self) -> int:
        """Bytes handed over in a step."""
        return sum(message.payload for message in self.of_step())

    @property
    def wire(self) -> int:
        """Bytes sent in a step when collectives are rings."""
        return sum(message.wire for message in self.of_step())


@dataclass(frozen=True)
class Estimate:
    """What a plan costs on devices of one kind.

    Ranks that differ only in their replica or tensor-parallel coordinate are alike, and so are those whose shares under
    sharded data parallelism are: `memory` and `messages` have one entry for each pipeline coordinate and size of share.
    `compute` is by stage. FLOPs and messages are of one step, memory is of the fullest moment of one.

    `unknown`: what is left out, for a model that is described by its tensors only.
    """

    plan: Plan
    device: Device
    memory: tuple[RankMemory, ...]
    messages: tuple[RankMessages, ...]
    compute: tuple[StageCompute, ...]
    unknown: tuple[str, ...]

    # -- memory -----------------------------------------------------------------------------------------------------

    def memory_of(self, rank: int) -> RankMemory:
        """The memory of `rank`."""
        return self.memory[self._entry(rank)]

    @cached_property
    def fullest(self) -> RankMemory:
        """The memory of the ranks that peak highest."""
        return max(self.memory, key=lambda memory: memory.peak)

    def fits(self, bytes_per_device: int) -> Fit:
        """Whether every rank peaks within `bytes_per_device`, and the rank that comes nearest or goes beyond."""
        worst = self.fullest
        rank = self.plan.topology.rank_of(Coordinates(pp=worst.pp, sdp=worst.sdp[0]))
        return Fit(worst.peak <= bytes_per_device, bytes_per_device, rank, worst.peak, worst.peak_at)

    # -- messages ---------------------------------------------------------------------------------------------------

    def messages_of(self, rank: int) -> RankMessages:
        """The messages of `rank`."""
        return self.messages[self._entry(rank)]

    # -- compute ----------------------------------------------------------------------------------------------------

    @cached_property
    def model_flops(self) -> float:
        """FLOPs that the model asks for in a step, of all ranks."""
        plan = self.plan
        return 3 * forward_flops(plan.description, plan.training.sequence_length) * plan.tokens_per_step

    @cached_property
    def hardware_flops(self) -> float:
        """FLOPs that are done in a step, by all ranks."""
        return (
            sum(stage.hardware for stage in self.compute)
            * self._backwards
            * self.plan.degrees.tp
            * self.plan.data_size
        )

    def hardware_flops_of(self, rank: int) -> float:
        """FLOPs that `rank` does in a step."""
        return sum(self.compute[stage].hardware for stage in self.plan.stages_of(rank)) * self._backwards

    @cached_property
    def timeline(self) -> Timeline:
        """One pass over the microbatches by FLOPs, messages left out; a forward of the average stage takes 1."""
        return timeline_of(self.plan, self.compute)

    @property
    def bubble(self) -> tuple[float, ...]:
        """The part of a pass, from 0 to 1, in which each pipeline rank waits."""
        return tuple(bubble / self.timeline.makespan for bubble in self.timeline.bubble)

    # ---------------------------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return {
            "plan": self.plan.hash,
            "device": self.device,
            "memory": [
                asdict(memory) | {"peak": memory.peak, "peak_at": memory.peak_at} for memory in self.memory
            ],
            "messages": [
                asdict(rank) | {"payload": rank.payload, "wire": rank.wire} for rank in self.messages
            ],
            "compute": [asdict(stage) for stage in self.compute],
            "model_flops": self.model_flops,
            "hardware_flops": self.hardware_flops,
            "bubble": list(self.bubble),
            "unknown": list(self.unknown),
        }

    @property
    def _backwards(self) -> int:
        return self.plan.microbatches * self.plan.training.accumulation

    def _entry(self, rank: int) -> int:
        """Where `rank` is in `memory` and `messages`."""
        place = self.plan.topology.coordinates(rank)
        return next(
            number
            for number, entry in enumerate(self.memory)
            if entry.pp == place.pp and entry.sdp[0] <= place.sdp < entry.sdp[1]
        )


def estimate(plan: Plan, *, device: Device = "gpu") -> Estimate:
    """What `plan` costs on ranks of one kind of device; touches none.

    >>> estimate(plan).fits(80 * 2**30)  # doctest: +SKIP
    """
    accounts = [Account(plan, device, pp) for pp in range(plan.degrees.pp)]
    shares = [(account, share) for account in accounts for share in account.shares]
    computes = {stage: stage_compute(account, stage) for account in accounts for stage in account.stages}
    known = accounts[0].sizes is not None
    return Estimate(
        plan=plan,
        device=device,
        memory=tuple(memory_of(account, share) for account, share in shares),
        messages=tuple(
            RankMessages(account.pp, (share.start, share.stop), messages_of(account, share))
            for account, share in shares
        ),
        compute=tuple(computes[stage] for stage in sorted(computes)),
        unknown=() if known else UNKNOWN_WITHOUT_SPEC,
    )
