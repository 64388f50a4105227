"""Estimate: memory, messages and FLOPs of every rank of a Plan, stored by coordinate."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, NamedTuple

from mpsdk.cost import forward_flops
from mpsdk.errors import ConfigError, Problem
from mpsdk.estimate.account import Account
from mpsdk.estimate.communication import Axes, Collective, Message, messages_of
from mpsdk.estimate.compute import StageCompute, stage_compute, timeline_of
from mpsdk.estimate.devices import DeviceFigures, device_figures
from mpsdk.estimate.frameworks import Device
from mpsdk.estimate.memory import RankMemory, memory_of
from mpsdk.estimate.step_time import StepTime, step_time
from mpsdk.plan import Plan
from mpsdk.schedule import Timeline
from mpsdk.topology import Coordinates

KINDS = ("gpu", "cpu")
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

    `unknown`: what is left out, for a model that is described by its tensors only. `figures`: of the devices, where they are
    known: what `fits` and `step_time` go by unless told otherwise.
    """

    plan: Plan
    device: Device
    memory: tuple[RankMemory, ...]
    messages: tuple[RankMessages, ...]
    compute: tuple[StageCompute, ...]
    unknown: tuple[str, ...]
    figures: DeviceFigures | None = None

    # -- memory -----------------------------------------------------------------------------------------------------

    def memory_of(self, rank: int) -> RankMemory:
        """The memory of `rank`."""
        return self.memory[self._entry(rank)]

    @cached_property
    def fullest(self) -> RankMemory:
        """The memory of the ranks that peak highest."""
        return max(self.memory, key=lambda memory: memory.peak)

    def fits(self, bytes_per_device: int | None = None) -> Fit:
        """Whether every rank peaks within `bytes_per_device`, and the rank that comes nearest or goes beyond.

        Args:
            bytes_per_device: None: what a rank may fill of the device that the estimate is for.

        Raises:
            ConfigError: neither is known.
        """
        if bytes_per_device is None:
            bytes_per_device = self._figures(None).usable_memory(self.plan.world_size)
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

    def step_time(self, device: str | os.PathLike[str] | DeviceFigures | None = None) -> StepTime:
        """How long a step takes. See `mpsdk.estimate.step_time`.

        Args:
            device: a device's name, a file of figures, or figures. None: the device that the estimate is for.

        Raises:
            ConfigError: the device is not known, or its figures lack one that the plan needs.
        """
        return step_time(self.plan, self._figures(device), model_flops=self.model_flops)

    # ---------------------------------------------------------------------------------------------------------------

    def __str__(self) -> str:
        from mpsdk.report.estimate_table import estimate_text

        return estimate_text(self)

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
            **self._verdicts(),
        }

    def _verdicts(self) -> dict[str, Any]:
        if self.figures is None:
            return {}
        return {"fits": asdict(self.fits()), "step_time": self.step_time().to_dict()}

    def _figures(self, device: str | os.PathLike[str] | DeviceFigures | None) -> DeviceFigures:
        if device is not None:
            return device_figures(device)
        if self.figures is None:
            remedy = 'only says the kind of device; say which: plan.estimate("h100"), or a file of measured figures'
            raise ConfigError([Problem("device", self.device, remedy)], where="the estimate")
        return self.figures

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


def estimate(plan: Plan, *, device: str | os.PathLike[str] | DeviceFigures = "gpu") -> Estimate:
    """What `plan` costs on ranks of one kind of device; touches none.

    >>> estimate(plan, device="h100").fits()  # doctest: +SKIP

    Args:
        device: "gpu" or "cpu": the kind only. A device's name, a file of figures, or figures: what its memory holds and how
            long a step takes come with it.

    Raises:
        ConfigError: the device is not known.
    """
    figures = None if device in KINDS else device_figures(device)
    kind: Device = figures.kind if figures is not None else "cpu" if device == "cpu" else "gpu"
    accounts = [Account(plan, kind, pp) for pp in range(plan.degrees.pp)]
    shares = [(account, share) for account in accounts for share in account.shares]
    computes = {stage: stage_compute(account, stage) for account in accounts for stage in account.stages}
    known = accounts[0].sizes is not None
    return Estimate(
        plan=plan,
        device=kind,
        memory=tuple(memory_of(account, share) for account, share in shares),
        messages=tuple(
            RankMessages(account.pp, (share.start, share.stop), messages_of(account, share))
            for account, share in shares
        ),
        compute=tuple(computes[stage] for stage in sorted(computes)),
        unknown=() if known else UNKNOWN_WITHOUT_SPEC,
        figures=figures,
    )
