"""The states after the last block that a rank finds in PyTorch. Runs in a pool's workers."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mpsdk.backend import Batch, Place
from mpsdk.families import read_model
from mpsdk.families.hf import HuggingFaceSource
from mpsdk.plan import Plan
from mpsdk_torch.backend import TorchBackend
from tests.cases import rows_of


def hidden_states(place: Place, plan: Plan, directory: str, batch: Batch) -> NDArray[Any] | None:
    """(rows, length, width) on the ranks of the last stage, microbatch after microbatch; None on others."""
    backend = TorchBackend()
    found: list[torch.Tensor] = []
    try:
        backend.build(plan, place)
        spec = plan.description.spec
        assert spec is not None
        read = read_model(directory, objective=spec.head.objective)
        backend.load(HuggingFaceSource(directory, read.family, spec))
        last = backend._ready.trainer.stages.get(len(plan.stages) - 1)
        if last is not None:
            block = list(last.blocks.values())[-1]
            block.register_forward_hook(lambda module, inputs, output: found.append(output.detach().clone()))
        backend.evaluate(rows_of(batch, plan, place.rank), step=0)
        return None if last is None else np.concatenate([each.numpy() for each in found])
    finally:
        backend.close()
