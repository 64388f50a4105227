"""mpsdk: the PyTorch backend under a plan."""

from __future__ import annotations

import torch._dynamo  # noqa: F401  (loaded early, as in `benchmarks.contenders.loops`)

from benchmarks.contenders import Seat
from benchmarks.contenders.planned import Planned
from mpsdk_torch.backend import TorchBackend


def plan(seat: Seat) -> Planned:
    return Planned(seat, TorchBackend(), "torch")
