"""Sharded data parallelism and mixed precision on FSDP2, with or without replicas.

FSDP2 wraps a stage whenever there are several shards or the compute dtype is not fp32 (on a mesh of one rank it
communicates nothing and only keeps the fp32 weights apart from their low-precision copies). Replicas of plain fp32 weights
need no copies and do without it: `mpsdk_torch.replicated`.

| level        | whole parameters        | gradients reduced   |
|--------------|-------------------------|---------------------|
| `parameters` | one block at a time     | after each backward |
| `gradients`  | during the step         | after each backward |
| `optimizer`  | during the step         | once a step         |

Replicas are summed once a step at every level. At level `parameters` the last block and the head stay whole until their
backward where that comes directly after the forward: it would gather them again at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from mpsdk.plan import Plan
from mpsdk_torch.precision import mixed_precision
from mpsdk_torch.transformer import Transformer


def needs_sharding(plan: Plan) -> bool:
    return plan.degrees.sdp > 1 or plan.distribution.precision.mode != "fp32"


def shard(stage: Transformer, plan: Plan, mesh: DeviceMesh) -> None:
    """Give each block, and the embedding and head, to FSDP2 as units of their own."""
    options = {
        "mesh": mesh,
        "reshard_after_forward": _level(plan) == "parameters",
        "mp_policy": mixed_precision(plan.distribution.precision),
    }
    blocks = [fully_shard(block, **options) for block in stage.blocks.values()]
    ends: list[nn.Module] = [part for part in (stage.embedding, stage.head) if part is not None]
    if stage.tied_here:
        fully_shard(ends, **options)  # one unit: a tied tensor may belong to one only
    else:
        for end in ends:
            fully_shard(end, **options)
        if isinstance(stage.embedding, FSDPModule) and not stage.spec.embedding_norm:
            stage.embedding.set_unshard_in_backward(False)  # a lookup's gradient needs no weights
    fully_shard(stage, **options)
    if isinstance(stage.head, FSDPModule) and plan.schedule.turns_at_once:
        for unit in (blocks[-1], stage.head):
            unit.set_reshard_after_forward(False)
    for unit in _units(stage):
        unit.set_gradient_divide_factor(1.0)  # the loss is already divided by the global count of tokens
        # Else gloo refuses the factor, and NCCL up to torch 2.13 returned zero gradients in bf16 (pytorch#190745).
        unit.set_force_sum_reduction_for_comms(True)
    ahead = plan.distribution.sharded_data_parallel.prefetch
    for index, block in enumerate(blocks):
        block.set_modules_to_forward_prefetch(blocks[index + 1 : index + 1 + ahead])
        block.set_modules_to_backward_prefetch(blocks[max(0, index - ahead) : index][::-1])


class ShardedReduction:
    """Tells FSDP2 what each backward of a stage is to reduce. See `mpsdk_torch.executor.Reduction`."""

    def __init__(self, stages: Mapping[int, nn.Module], plan: Plan) -> None:
        self._stages = {number: stage for number, stage in stages.items() if isinstance(stage, FSDPModule)}
        self._told: dict[int, tuple[bool, bool]] = {}
        self._level = _level(plan)

    def before_backward(self, stage: int, *, last: bool, complete: bool) -> None:
        if stage not in self._stages or self._told.get(stage) == (last, complete):
            return
        self._told[stage] = (last, complete)  # each call walks over all units
        module = self._stages[stage]
        module.set_requires_gradient_sync(complete and (last or self._level != "optimizer"))
        module.set_requires_all_reduce(last)
        module.set_is_last_backward(last)
        module.set_reshard_after_backward(last or self._level == "parameters")

    def after_weight_gradients(self, stage: int, *, last: bool) -> None:
        if stage not in self._stages:
            return
        # There is no public call for a reduction outside of a backward. These are the ones that torch's own pipeline stages
        # make (torch/distributed/pipelining/stage.py, perform_reduce_grad).
        state: Any = fully_shard.state(self._stages[stage])  # pyright: ignore[reportFunctionMemberAccess]
        groups = [group for unit in state._state_ctx.all_states for group in unit._fsdp_param_groups]
        # First without reducing: that takes the new gradients over into fp32, where those of the backward are already.
        self.before_backward(stage, last=last, complete=False)
        for group in groups:
            group.post_backward()
        self.before_backward(stage, last=last, complete=True)
        for group in groups:
            group.post_backward()
        state._root_post_backward_final_callback()

    def finish(self) -> None:
        """FSDP2 waits at the end of each backward."""


def release(stage: nn.Module) -> None:
    """Drop whole parameters that a forward without a backward left behind."""
    for unit in _units(stage):
        unit.reshard()


def _units(stage: nn.Module) -> list[FSDPModule]:
    return [module for module in stage.modules() if isinstance(module, FSDPModule)]


def _level(plan: Plan) -> str:
    """The level to run; with one shard there is nothing to hold back, so gradients wait for the last backward."""
    return plan.distribution.sharded_data_parallel.level if plan.degrees.sdp > 1 else "optimizer"
