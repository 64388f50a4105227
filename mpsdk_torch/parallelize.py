"""The whole story of making one stage parallel, in its order."""

from __future__ import annotations

import torch

from mpsdk.plan import Plan
from mpsdk_torch.compiled import compile_blocks
from mpsdk_torch.nn import DistributedLinear, DistributedOutput
from mpsdk_torch.nn.deferred import deferrable_linear
from mpsdk_torch.recompute import set_recompute
from mpsdk_torch.sharded import needs_sharding, shard
from mpsdk_torch.topology import Groups
from mpsdk_torch.transformer import Transformer


def parallelize(plan: Plan, stage: int, groups: Groups) -> Transformer:
    """Stage number `stage` on this rank's device, cut, recomputing, compiled, and sharded; its weights not filled yet."""
    spec = plan.description.spec
    assert spec is not None
    with torch.device("meta"):  # tensor parallelism: the layers make themselves at this rank's size
        model = Transformer(
            spec,
            vocab_rows=plan.padded_vocab_size,
            blocks=plan.stages[stage],
            first=stage == 0,
            last=stage == len(plan.stages) - 1,
            group=groups.tensor,
        )
    if plan.schedule.splits_backward:
        for layer in model.modules():
            if isinstance(layer, DistributedLinear | DistributedOutput):
                layer.linear = deferrable_linear
    pin_memory = groups.device.type == "cuda"
    set_recompute(model, plan.distribution.activation_checkpointing, pin_memory=pin_memory)
    if plan.distribution.compile.enabled:
        compile_blocks(model, plan, groups.device)
    if needs_sharding(plan):
        assert groups.sharding is not None
        shard(model, plan, groups.sharding)
    model.to_empty(device=groups.device)
    return model.train()
