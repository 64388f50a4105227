"""FSDP2 through Accelerate."""

from __future__ import annotations

from accelerate import Accelerator
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, fsdp_utils  # noqa: F401  (loaded early)
from torch import nn
from torch.distributed.fsdp import FSDPModule

from benchmarks.contenders import Seat
from benchmarks.contenders.loops import Loop, adamw, join, load


def fsdp2(seat: Seat) -> Loop:
    """Every block a unit, then the root, as Accelerate wraps them.

    On a CPU, Accelerate takes an FSDP plugin and makes the model DDP all the same (accelerate/state.py asks for a GPU), so
    here its state is told that it is FSDP.
    """
    join(seat)
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["GPT2Block"],
        cpu_ram_efficient_loading=False,
    )
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
    vars(accelerator.state).update(distributed_type=DistributedType.FSDP, fsdp_plugin=plugin)
    loaded = load(seat)
    model, optimizer = accelerator.prepare(loaded, adamw(loaded))
    assert isinstance(model, nn.Module) and isinstance(model, FSDPModule)
    return Loop(seat, model, optimizer, backward=accelerator.backward, clip=accelerator.clip_grad_norm_)
