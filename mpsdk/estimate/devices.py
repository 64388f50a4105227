"""DeviceFigures: what a device does in a second, from a datasheet or measured; what a step's time is reckoned from.

Known devices are in `mpsdk.estimate.datasheets`; `benchmarks/device.py` measures a machine and writes a file of this form.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

from annotated_types import Ge, Gt, Lt, MinLen
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, FiniteFloat, ValidationError

from mpsdk.config import problems_of
from mpsdk.errors import ConfigError, Problem
from mpsdk.estimate.frameworks import Device

PrecisionMode = Literal["fp32", "bf16", "fp16"]
Collective = Literal["all-gather", "reduce-scatter", "all-reduce", "send"]

_Positive = Annotated[FiniteFloat, Gt(0)]
_Seconds = Annotated[FiniteFloat, Ge(0)]
_Count = Annotated[int, Ge(1)]


class Rate(NamedTuple):
    """An operation of `flops` FLOPs does `per_second` of them in a second."""

    flops: _Positive
    per_second: _Positive


def _growing(rates: tuple[Rate, ...]) -> tuple[Rate, ...]:
    for below, above in pairwise(rates):
        if above.flops <= below.flops:
            raise ValueError(
                f"has {above.flops:g} FLOPs after {below.flops:g}; list sizes once each, smallest first"
            )
    return rates


Rates = Annotated[tuple[Rate, ...], MinLen(1), AfterValidator(_growing)]


class _Figures(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Link(_Figures):
    """What one rank sends in one direction: `latency` seconds before the first byte, then `bandwidth` bytes a second."""

    latency: _Seconds
    bandwidth: _Positive


class MeasuredCollective(_Figures):
    """A collective among `ranks` ranks of one machine: `latency` seconds the call, then `bandwidth` bytes on the wire a
    second (those of a ring, as `Message.wire` counts them)."""

    collective: Collective
    ranks: _Count
    latency: _Seconds
    bandwidth: _Positive


class Speeds(_Figures):
    """What each rank does while `ranks` ranks are at work on its machine at once.

    `matmul` and `attention`: by precision, the rate at some sizes of an operation, smallest first; small ones are slow. Of
    attention, FLOPs that are done: the causal half. `memory_bandwidth` and `update_bandwidth`: bytes that elementwise
    operations and an optimizer's update read and write in a second. `kernel_seconds`: what an operation takes beside its
    work. `inside`: the link within a machine, for what `collectives` has no row.
    """

    ranks: _Count
    matmul: dict[PrecisionMode, Rates]
    attention: dict[PrecisionMode, Rates]
    memory_bandwidth: _Positive
    update_bandwidth: _Positive
    kernel_seconds: _Seconds = 0.0
    inside: Link
    collectives: tuple[MeasuredCollective, ...] = ()


class DeviceFigures(_Figures):
    """One kind of device, and how its ranks are linked.

    A GPU is a rank's own; a machine's cores and memory (`kind="cpu"`) are shared by the ranks on it, so that `speeds` has a
    row for each number of them that was measured. `memory_bytes` and `peak_flops` are of one GPU, or of one machine's CPU.

    `reserved`: the part of the memory that is kept for libraries and fragmentation. `between`: the link of one rank to
    another machine. `cores`: of a CPU; with more ranks than cores, a rank that waits leaves its core to others.
    """

    name: Annotated[str, MinLen(1)]
    kind: Device
    source: str
    memory_bytes: _Count
    reserved: Annotated[float, Ge(0), Lt(1)] = 0.0
    peak_flops: dict[PrecisionMode, _Positive]
    ranks_per_node: _Count
    cores: _Count | None = None
    speeds: Annotated[tuple[Speeds, ...], MinLen(1)]
    between: Link | None = Field(default=None)

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> DeviceFigures:
        """The figures in a .json, .yaml or .yml file. Raises ConfigError listing every problem."""
        from mpsdk.config.files import read_file

        file = read_file(path, root="device")
        if file.problems:
            raise ConfigError(file.problems, where=os.fspath(path))
        try:
            return cls.model_validate(file.content)
        except ValidationError as error:
            raise ConfigError(problems_of(error, root="device"), where=os.fspath(path)) from None

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the figures, as JSON."""
        Path(path).write_text(self.model_dump_json(indent=1) + "\n", encoding="utf-8")

    def ranks_on_node(self, world_size: int) -> int:
        """How many ranks of a world this large share a machine."""
        return min(world_size, self.ranks_per_node)

    def sharing(self, ranks: int) -> int:
        """How many of the `ranks` ranks on a machine share one `memory_bytes` and `peak_flops`."""
        return ranks if self.kind == "cpu" else 1

    def usable_memory(self, world_size: int) -> int:
        """Bytes that each rank may fill."""
        return int(self.memory_bytes * (1 - self.reserved)) // self.sharing(self.ranks_on_node(world_size))

    def at(self, ranks: int) -> Speeds:
        """The speeds with `ranks` ranks at work on a machine: those measured with as many, or with the next more.

        With more ranks than were ever measured, those of the most.
        """
        rows = sorted(self.speeds, key=lambda speeds: speeds.ranks)
        return next((row for row in rows if row.ranks >= ranks), rows[-1])

    @property
    def asynchronous(self) -> bool:
        """Whether kernels and collectives run beside the host and beside each other."""
        return self.kind == "gpu"


def rate_at(rates: Sequence[Rate], flops: float) -> float:
    """FLOP/s of an operation of `flops` FLOPs: between two sizes by the logarithm of the size, beyond them the nearest."""
    if flops <= rates[0].flops:
        return rates[0].per_second
    for below, above in pairwise(rates):
        if flops <= above.flops:
            part = math.log(flops / below.flops) / math.log(above.flops / below.flops)
            return below.per_second * (above.per_second / below.per_second) ** part
    return rates[-1].per_second


def rates_of(
    figures: DeviceFigures, table: dict[PrecisionMode, Rates], precision: PrecisionMode
) -> Sequence[Rate]:
    """The rates for `precision`. Raises ConfigError where the figures have none."""
    if precision not in table:
        remedy = f"has no rates for precision {precision}, only for {', '.join(table)}; measure them, or use another device"
        raise ConfigError([Problem("device", figures.name, remedy)], where="the estimate")
    return table[precision]


def device_figures(device: str | os.PathLike[str] | DeviceFigures) -> DeviceFigures:
    """The figures of a device by its name, from a file, or as they are.

    >>> device_figures("h100").memory_bytes
    85520809984

    Raises ConfigError for an unknown name or a file that does not hold figures.
    """
    from mpsdk.estimate.datasheets import DATASHEETS

    if isinstance(device, DeviceFigures):
        return device
    name = os.fspath(device)
    if name in DATASHEETS:
        return DATASHEETS[name]
    if Path(name).suffix:
        return DeviceFigures.from_file(name)
    known = ", ".join(DATASHEETS)
    remedy = (
        f"is no device that is known here ({known}); give one of them, or the path of a .json or .yaml file"
    )
    raise ConfigError([Problem("device", name, remedy)], where="the estimate")
