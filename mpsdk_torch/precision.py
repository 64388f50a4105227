"""Mixed precision: computing in bf16 or fp16 over fp32 weights, gradients reduced in fp32, and the fp16 loss scale."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.fsdp import MixedPrecisionPolicy

from mpsdk.config import Precision

COMPUTE_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def mixed_precision(precision: Precision) -> MixedPrecisionPolicy:
    """FSDP2's policy: whole parameters in the compute dtype, gradients reduced and kept in fp32."""
    if precision.mode == "fp32":
        return MixedPrecisionPolicy()
    return MixedPrecisionPolicy(
        param_dtype=COMPUTE_DTYPES[precision.mode], reduce_dtype=torch.float32, cast_forward_inputs=False
    )


class LossScale:
    """Dynamic loss scaling for fp16 (Micikevicius et al. 2018, arXiv:1710.03740, section 3.2), all on the device.

    A step whose gradients overflowed is skipped and the scale halved; after `interval` good steps in a row the scale is
    doubled. With other precisions the scale is 1 and stays.
    """

    def __init__(self, precision: Precision, device: torch.device) -> None:
        self.active = precision.mode == "fp16"
        self.interval = precision.loss_scale_growth_interval
        start = precision.initial_loss_scale if self.active else 1.0
        self.scale = torch.tensor(start, dtype=torch.float32, device=device)
        self.good_steps = torch.tensor(0, dtype=torch.int32, device=device)

    def update(self, overflowed: Tensor) -> None:
        """Take note of a step; `overflowed` is a boolean scalar on the device, equal on all ranks."""
        good = torch.where(overflowed, 0, self.good_steps + 1)
        grow = good >= self.interval
        factor = torch.where(overflowed, 0.5, torch.where(grow, 2.0, 1.0))
        self.scale.mul_(factor)
        self.good_steps.copy_(torch.where(grow, 0, good))
