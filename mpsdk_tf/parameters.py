"""The parameters that this rank holds, each joined with what the plan says of it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import tensorflow as tf

from mpsdk.plan import LocalTensor, Plan
from mpsdk_tf.tensor import Tensor


@dataclass(frozen=True)
class Held:
    """One parameter: the plan's account of it, and the rows [start, start + local rows) of it that lie here, in fp32."""

    planned: LocalTensor
    local: Tensor
    start: int

    @property
    def name(self) -> str:
        return self.planned.name

    @property
    def canonical_slice(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Offset and shape, in the canonical tensor, of the values that lie here; padding left out."""
        return self.planned.canonical_slice(self.start, self.start + self.local.shape[0])


def held_parameters(plan: Plan, stages: Iterable[int], *, tp: int, sdp: int) -> dict[int, list[Held]]:
    """Every parameter of `stages`, by stage and in the plan's order. Their values are not there yet."""
    return {
        number: [_held(planned, sdp, plan.degrees.sdp) for planned in plan.stage_tensors(number, tp)]
        for number in stages
    }


def _held(planned: LocalTensor, sdp: int, degree: int) -> Held:
    """Dimension 0 is cut as torch.chunk cuts it, which is what the plan's estimate counts."""
    start, stop = planned.rows(sdp, degree)
    shape = (stop - start, *planned.shape[1:])
    return Held(planned, tf.Variable(tf.zeros(shape, tf.float32), trainable=False, name=planned.name), start)
