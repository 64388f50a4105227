"""What a checkpoint is, in a few lines: for `mpsdk checkpoint inspect` and for people."""

from __future__ import annotations

import math
from typing import cast

from pydantic import BaseModel, ConfigDict

from mpsdk.checkpoint.manifest import Manifest
from mpsdk.topology import AXES


class Summary(BaseModel):
    """Printed by `str()`; plain data by `model_dump()`."""

    model_config = ConfigDict(frozen=True)

    path: str
    step: int
    samples_consumed: int
    framework: str
    naming: str
    world_size: int | None  # of the run that wrote it, with its layout; None where the plan does not say
    layout: dict[str, int]  # mesh axis -> degree
    plan_hash: str
    parameters: int  # elements of the slot "weight", a tied tensor once
    tensors: int
    slots: tuple[str, ...]
    chunks: int
    files: int
    bytes: int  # of the ranks' files
    scalars: dict[str, int | float]
    seeds: dict[str, int]

    def __str__(self) -> str:
        layout = " · ".join(f"{axis} {degree}" for axis, degree in self.layout.items()) or "unknown"
        world = f", {self.world_size} ranks" if self.world_size else ""
        rows = {
            "checkpoint": self.path,
            "step": f"{self.step:,} ({self.samples_consumed:,} samples consumed)",
            "written by": f"{self.framework}, {layout}{world}",
            "plan": self.plan_hash,
            "tensors": f"{self.tensors:,} ({self.naming} names), {self.parameters:,} parameters",
            "slots": ", ".join(self.slots),
            "on disk": f"{_size(self.bytes)} in {self.files:,} files, {self.chunks:,} chunks",
            "scalars": ", ".join(f"{name} {value}" for name, value in self.scalars.items()) or "none",
            "seeds": ", ".join(f"{name} {value}" for name, value in self.seeds.items()) or "none",
        }
        width = max(map(len, rows))
        return "\n".join(f"{name:<{width}}  {value}" for name, value in rows.items())


def summarise(path: str, manifest: Manifest) -> Summary:
    weights = {key: tensor for key, tensor in manifest.tensors.items() if key.startswith("weight/")}
    world_size = manifest.plan.get("world_size")
    return Summary(
        path=path,
        step=manifest.step,
        samples_consumed=manifest.samples_consumed,
        framework=manifest.framework,
        naming=manifest.naming,
        world_size=world_size if isinstance(world_size, int) else None,
        layout=_layout(manifest.plan.get("degrees")),
        plan_hash=manifest.plan_hash,
        parameters=sum(tensor.elements for tensor in weights.values()),
        tensors=len(weights),
        slots=tuple(sorted({key.partition("/")[0] for key in manifest.tensors}, reverse=True)),
        chunks=sum(len(tensor.chunks) for tensor in manifest.tensors.values()),
        files=len(manifest.files),
        bytes=sum(file.bytes for file in manifest.files.values()),
        scalars=manifest.scalars,
        seeds=manifest.seeds,
    )


def _layout(degrees: object) -> dict[str, int]:
    """The plan's degrees, in JSON a list in the order of AXES (a mapping is understood too)."""
    if isinstance(degrees, dict):
        return {str(axis): int(degree) for axis, degree in cast("dict[str, int]", degrees).items()}
    if isinstance(degrees, list):
        return dict(zip(AXES, cast("list[int]", degrees), strict=False))
    return {}


def _size(count: int) -> str:
    if count < 1024:
        return f"{count} bytes"
    power = min(4, int(math.log2(count)) // 10)
    return f"{count / 1024**power:.1f} {('KiB', 'MiB', 'GiB', 'TiB')[power - 1]}"
