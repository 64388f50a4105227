"""The parameters that this rank holds, each joined with what the plan says of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mpsdk.plan import LocalTensor, Plan
from mpsdk_torch.transformer import Transformer


@dataclass(frozen=True)
class Held:
    """One parameter: the plan's account of it, and the rows [start, start + local rows) of it that FSDP2 left here."""

    planned: LocalTensor
    parameter: nn.Parameter
    start: int

    @property
    def name(self) -> str:
        return self.planned.name

    @property
    def canonical_slice(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Offset and shape, in the canonical tensor, of the values that lie here; padding left out."""
        return self.planned.canonical_slice(self.start, self.start + self.local.shape[0])

    @property
    def local(self) -> Tensor:
        """This rank's values, in the memory that FSDP2 gathers from."""
        return _plain(self.parameter.detach())

    @property
    def gradient(self) -> Tensor | None:
        return None if self.parameter.grad is None else _plain(self.parameter.grad)


def held_parameters(plan: Plan, stages: Mapping[int, Transformer], *, tp: int, sdp: int) -> list[Held]:
    """Every parameter of `stages`, in the plan's order. What the modules hold must be what the plan says."""
    held: list[Held] = []
    for number, stage in stages.items():
        parameters = dict(stage.named_parameters())
        for planned in plan.stage_tensors(number, tp):
            parameter = parameters.pop(planned.name)
            assert tuple(parameter.shape) == planned.shape, (
                planned.name,
                tuple(parameter.shape),
                planned.shape,
            )
            start = 0
            if isinstance(parameter, DTensor):
                start, _ = planned.rows(sdp, plan.degrees.sdp)  # FSDP2 cuts dimension 0 as torch.chunk does
            held.append(Held(planned, parameter, start))
        assert not parameters, (
            f"stage {number} holds tensors that the plan doesn't name: {sorted(parameters)}"
        )
    return held


def _plain(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
