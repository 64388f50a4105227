"""What is a framework's own mechanism and not the plan's, as tables.

The plan says what is shared out; `Sharding` says what a framework holds where its mechanism differs from the
definition of a level, and `Kernels` what its kernels keep for the backward pass: the same layer keeps more on a CPU than
on a GPU. The formulas that use these are the same for every framework (`docs/estimate.md`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mpsdk.families.spec import TransformerSpec

Device = Literal["gpu", "cpu"]
Level = Literal["parameters", "gradients", "optimizer"]
Attention = Literal["fused", "math", "weights"]
Recompute = Literal["all of it", "until the last kept", "what is read"]


@dataclass(frozen=True)
class Sharding:
    """What a rank holds at one level of sharded data parallelism: a share of 1 / sdp, or the whole.

    `shares_parameters`: the fp32 weights between steps. `gathers`: what is whole at a time during a step, beside those
    shares or in a low-precision dtype. `shares_gradients`: the fp32 sums between two backwards of a step.
    """

    shares_parameters: bool
    gathers: Literal["block", "stage"]
    shares_gradients: bool


# ZeRO's stages 3, 2 and 1 (Rajbhandari et al. 2019, arXiv:1910.02054, section 5).
ZERO: dict[Level, Sharding] = {
    "parameters": Sharding(shares_parameters=True, gathers="block", shares_gradients=True),
    "gradients": Sharding(shares_parameters=False, gathers="stage", shares_gradients=True),
    "optimizer": Sharding(shares_parameters=False, gathers="stage", shares_gradients=False),
}
# FSDP2 keeps fp32 weights as shares between steps at every level, and gathers copies of them for a step; so does mpsdk_tf.
FSDP2: dict[Level, Sharding] = {
    "parameters": Sharding(shares_parameters=True, gathers="block", shares_gradients=True),
    "gradients": Sharding(shares_parameters=True, gathers="stage", shares_gradients=True),
    "optimizer": Sharding(shares_parameters=True, gathers="stage", shares_gradients=False),
}


@dataclass(frozen=True)
class Kernels:
    """What the kernels of one kind of device keep for the backward pass, where kinds differ.

    `fused_rms_norm`: False is a composition that keeps its input and the normalised input in fp32. `fused_dropout`: keeps
    a mask of one byte an element; False keeps the scaled mask in the compute dtype. `fp32_statistics`: of layer norm;
    False has them in the compute dtype. `fused_attention`: False is one operation that keeps the weights of every pair of
    tokens, in the compute dtype and before any is dropped. `attention_dropout`: whether fused attention can drop.
    `grouped_fp32_attention`: whether fused attention does grouped queries in fp32. `statistics_rows`: rows to which the
    fused attention kernel for fp32 pads its logsumexp. `keeps_masks`: of dropout, and of token ids that another rank
    looks up; False makes them again, from seeds that are kept, and from the ids. `keeps_unread`: selective recompute keeps
    results of the chosen operations that no backward reads, too. `keeps_padding`: so does the loss with padding rows of the
    vocabulary. `loss_in_place`: the loss's backward turns its exponentials into the gradient; False has two fp32 arrays of
    that size beside them.
    """

    fused_rms_norm: bool
    fused_dropout: bool
    fp32_statistics: bool
    attention_dropout: bool
    grouped_fp32_attention: bool
    statistics_rows: int
    fused_attention: bool = True
    keeps_masks: bool = True
    keeps_unread: bool = True
    keeps_padding: bool = True
    loss_in_place: bool = True

    def attention(self, *, fp32: bool, grouped: bool, dropout: bool) -> Attention:
        """Which attention runs: fused keeps what enters and leaves it, the others also the weights of every pair of tokens.

        Math is made of its parts, each of them an operation to the framework, in fp32.
        """
        if not self.fused_attention:
            return "weights"
        if dropout and not self.attention_dropout:
            return "math"
        return "math" if grouped and fp32 and not self.grouped_fp32_attention else "fused"


def attention_kernel(spec: TransformerSpec, kernels: Kernels, *, fp32: bool) -> Attention:
    """Which attention runs in a model."""
    grouped = spec.heads != spec.key_value_heads
    return kernels.attention(fp32=fp32, grouped=grouped, dropout=spec.dropout.attention > 0)


@dataclass(frozen=True)
class Framework:
    """A framework's mechanisms.

    `prefetches_by_past_order`: whether a unit's backward, unless told otherwise, gathers the unit whose forward came before
    its own (FSDP2's default). `recomputes`: of a block whose operations are computed again; up to the last tensor that its
    forward kept (PyTorch's checkpoint without reentrance), or only what its backward reads. `index_bytes`: of a token id or
    label on the device.
    """

    sharding: dict[Level, Sharding]
    prefetches_by_past_order: bool
    recomputes: Recompute
    index_bytes: int
    kernels: dict[Device, Kernels]


# CPU: measured by tests/torch/test_estimate.py. GPU: from PyTorch's derivatives.yaml and the documentation of
# scaled_dot_product_attention ("enable_gqa ... works only for Flash_attention and math kernel on CUDA tensor"); flash
# runs in bf16 and fp16, memory-efficient attention in fp32.
TORCH_KERNELS: dict[Device, Kernels] = {
    "gpu": Kernels(
        fused_rms_norm=True,
        fused_dropout=True,
        fp32_statistics=True,
        attention_dropout=True,
        grouped_fp32_attention=False,
        statistics_rows=32,
    ),
    "cpu": Kernels(
        fused_rms_norm=False,
        fused_dropout=False,
        fp32_statistics=False,
        attention_dropout=False,
        grouped_fp32_attention=True,
        statistics_rows=1,
    ),
}
# The gradients of mpsdk_tf/nn, which say themselves what they keep, on every device: tests/tf/test_estimate.py.
TENSORFLOW_KERNELS = Kernels(
    fused_rms_norm=True,
    fused_dropout=False,
    fp32_statistics=True,
    attention_dropout=True,
    grouped_fp32_attention=True,
    statistics_rows=1,
    fused_attention=False,
    keeps_masks=False,
    keeps_unread=False,
    keeps_padding=False,
    loss_in_place=False,
)

FRAMEWORKS = {
    "torch": Framework(
        FSDP2,
        prefetches_by_past_order=True,
        recomputes="until the last kept",
        index_bytes=8,
        kernels=TORCH_KERNELS,
    ),
    "tensorflow": Framework(
        FSDP2,
        prefetches_by_past_order=False,
        recomputes="what is read",
        index_bytes=4,
        kernels={"gpu": TENSORFLOW_KERNELS, "cpu": TENSORFLOW_KERNELS},
    ),
}
OTHERS = Framework(
    ZERO,
    prefetches_by_past_order=False,
    recomputes="all of it",
    index_bytes=8,
    kernels=TORCH_KERNELS,
)


def framework_of(name: str) -> Framework:
    """The mechanisms of framework `name`; for one that has no row, the levels as they are defined."""
    return FRAMEWORKS.get(name, OTHERS)
