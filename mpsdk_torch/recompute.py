"""Activation checkpointing: what a block keeps from its forward for its backward.

`none` keeps everything; `full` keeps the block's input (on the CPU when offloaded); `selective` keeps the input and the
results of chosen operations, the dear ones to compute again (Korthikanti et al. 2022, arXiv:2205.05198, section 5, recompute
attention alone instead).
Dropout needs no saved generator state: its masks are functions of where they stand (`mpsdk_torch.dropout`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from mpsdk.config import ActivationCheckpointing
from mpsdk_torch.dropout import Moment
from mpsdk_torch.transformer import Block, BlockCall, Recompute, Transformer, keep_everything

_ATEN = torch.ops.aten
KEPT_OPERATIONS = {
    "attention": frozenset(
        {
            _ATEN._scaled_dot_product_flash_attention.default,
            _ATEN._scaled_dot_product_flash_attention_for_cpu.default,
            _ATEN._scaled_dot_product_efficient_attention.default,
            _ATEN._scaled_dot_product_cudnn_attention.default,
        }
    ),
    "matmul": frozenset(
        {
            _ATEN.mm.default,
            _ATEN.addmm.default,
            _ATEN.bmm.default,
            _ATEN.baddbmm.default,
            _ATEN.linear.default,
        }
    ),
}


def set_recompute(model: Transformer, settings: ActivationCheckpointing, *, pin_memory: bool) -> None:
    """Have every block of `model` keep what `settings` say. `pin_memory`: offload into pages that a GPU can write to."""
    for block in model.blocks.values():
        assert isinstance(block, Block)
        block.recompute = _recompute_of(settings, pin_memory)


def _recompute_of(settings: ActivationCheckpointing, pin_memory: bool) -> Recompute:
    if settings.mode == "none":
        return keep_everything
    if settings.mode == "selective":
        kept = frozenset().union(*(KEPT_OPERATIONS[name] for name in settings.keep))
        return partial(_selective, partial(_policy, kept))
    return partial(_offloaded, pin_memory) if settings.offload else _full


def _full(layer: BlockCall, hidden: Tensor, moment: Moment | None, reach: Tensor | None) -> Tensor:
    return checkpoint(layer, hidden, moment, reach, use_reentrant=False, preserve_rng_state=False)


def _offloaded(
    pin_memory: bool, layer: BlockCall, hidden: Tensor, moment: Moment | None, reach: Tensor | None
) -> Tensor:
    # The reentrant form saves the input through autograd, where `save_on_cpu` can move it; the other form keeps the
    # input in a closure, out of any hook's reach.
    with torch.autograd.graph.save_on_cpu(pin_memory=pin_memory):
        return checkpoint(layer, hidden, moment, reach, use_reentrant=True, preserve_rng_state=False)


def _selective(
    policy: Callable[..., CheckpointPolicy],
    layer: BlockCall,
    hidden: Tensor,
    moment: Moment | None,
    reach: Tensor | None,
) -> Tensor:
    return checkpoint(
        layer,
        hidden,
        moment,
        reach,
        use_reentrant=False,
        preserve_rng_state=False,
        context_fn=partial(create_selective_checkpoint_contexts, policy),
    )


def _policy(
    kept: frozenset[object], _context: object, operation: object, *_args: object, **_kwargs: object
) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in kept else CheckpointPolicy.PREFER_RECOMPUTE
