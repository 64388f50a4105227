"""Estimate: memory of every rank of a Plan, stored by coordinate."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from mpsdk.estimate.frameworks import Device
from mpsdk.estimate.memory import RankMemory, memory_of
from mpsdk.plan import Plan
from mpsdk.topology import Coordinates


@dataclass(frozen=True)
class Fit:
    """Whether every rank stays below `bytes_per_device`, and the fullest rank. True when it fits."""

    fits: bool
    bytes_per_device: int
    rank: int
    peak: int
    peak_at: str

    def __bool__(self) -> bool:
        return self.fits


@dataclass(frozen=True)
class Estimate:
    """What a plan costs. `device`: the kind whose kernels run."""

    plan: Plan
    device: Device
    memory: tuple[RankMemory, ...]

    def memory_of(self, rank: int) -> RankMemory:
        """The memory of `rank`."""
        place = self.plan.topology.coordinates(rank)
        return next(m for m in self.memory if m.pp == place.pp and m.sdp[0] <= place.sdp < m.sdp[1])

    @cached_property
    def worst(self) -> RankMemory:
        """The memory of the fullest ranks."""
        return max(self.memory, key=lambda memory: memory.peak)

    def fits(self, bytes_per_device: int) -> Fit:
        """Whether every rank's peak is at most `bytes_per_device`."""
        worst = self.worst
        rank = self.plan.topology.rank_of(Coordinates(pp=worst.pp, sdp=worst.sdp[0]))
        return Fit(worst.peak <= bytes_per_device, bytes_per_device, rank, worst.peak, worst.peak_at)

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "plan": self.plan.hash,
            "device": self.device,
            "memory": [asdict(memory) for memory in self.memory],
        }


def estimate(plan: Plan, *, device: Device = "gpu") -> Estimate:
    """The estimate of `plan` on ranks of one kind of device. Touches none."""
    return Estimate(plan, device, memory_of(plan, device))
