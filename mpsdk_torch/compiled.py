"""Compilation of a stage's blocks by torch.compile.

Blocks of one shape share one program: parameters enter it as inputs, and nothing in it depends on which block runs. What is
compiled is what runs inside a block's forward, so that FSDP2's hooks, which sit on the module's call, stay outside.
Embedding, head and loss are not compiled.

A block is one whole graph, the collectives of tensor parallelism included: torch takes `torch.distributed` calls into a graph
as its functional collectives. Two things break it into several, with the compiler's part between them:

- linear layers that can defer their weight gradient (`mpsdk_torch.nn.deferred`). A matrix product gains little from the
  compiler anyway;
- active dropout, which seeds a generator (`mpsdk_torch.dropout`). Its masks are those of a run that is not compiled.

| recompute   | under compilation                                                                      |
|-------------|----------------------------------------------------------------------------------------|
| `full`      | stands around the program, which runs a second time                                    |
| `selective` | is part of the program, which the compiler divides by the same policy; asks for one graph |
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mpsdk.errors import BackendError
from mpsdk.plan import Plan
from mpsdk_torch.nn import DistributedLinear
from mpsdk_torch.precision import COMPUTE_DTYPES
from mpsdk_torch.transformer import Block, Transformer

COMPILER = "inductor"
_before: list[bool] = []  # whether the compiler failed at its limit of programs, before anything was built


def prepare_compiler(device: torch.device, note: Callable[[str], None]) -> None:
    """Forget earlier programs, see that the compiler works on `device`, and have it tell `note` of each program.

    Raises BackendError when it doesn't work.
    """
    forget_programs()
    # Else torch goes on without compiling what has had too many programs, and only logs it.
    _before.append(torch.compiler.config.fail_on_recompile_limit_hit)
    torch.compiler.config.fail_on_recompile_limit_hit = True
    _tell(note)
    try:
        torch.compile(_probe, dynamic=False, fullgraph=True, backend=COMPILER)(torch.ones(8, device=device))
    except Exception as error:
        forget_programs()
        needed = (
            "a C++ compiler and Python's headers (on Debian: apt install g++ python3-dev)"
            if device.type == "cpu"
            else "Triton and a C compiler (on Debian: apt install gcc python3-dev)"
        )
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise BackendError(
            f"compile: true doesn't work on this machine ({reason}). PyTorch's compiler needs {needed}; "
            "install them, or set compile: false"
        ) from error


def compile_blocks(stage: Transformer, plan: Plan, device: torch.device) -> None:
    """Have the blocks of `stage`, whose recompute is set, run as compiled programs. Shapes are static."""
    whole = is_whole(plan)

    def compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return torch.compile(function, dynamic=False, fullgraph=whole, backend=COMPILER)

    layer = compiled(Block.layer)
    for block in stage.blocks.values():
        assert isinstance(block, Block)
        block.layer = partial(layer, block)
        if plan.distribution.activation_checkpointing.mode == "selective":
            block.recompute = compiled(block.recompute)
        if plan.schedule.splits_backward:
            _leave_out_linear_layers(block)
        if block.attention.rotary is not None:  # made now, so that no program makes it
            dtype = COMPUTE_DTYPES[plan.distribution.precision.mode]
            like = torch.empty(0, dtype=dtype, device=device)
            block.attention.rotary(plan.training.sequence_length, like)


def forget_programs() -> None:
    """Let go of all programs, of the process groups that they hold, and of what `prepare_compiler` set."""
    torch.compiler.reset()  # callbacks included
    if _before:
        torch.compiler.config.fail_on_recompile_limit_hit = _before.pop()


def is_whole(plan: Plan) -> bool:
    """Whether a block is one graph in training under `plan`."""
    spec = plan.description.spec
    assert spec is not None
    return not (plan.schedule.splits_backward or spec.dropout.attention or spec.dropout.residual)


def _leave_out_linear_layers(block: Block) -> None:
    for layer in block.modules():
        if isinstance(layer, DistributedLinear):
            eager: Any = torch.compiler.disable(layer.forward, reason="its weight gradient is deferred")
            layer.forward = eager


def _tell(note: Callable[[str], None]) -> None:
    # A first step may compile for minutes, and a rank that notes nothing for long is taken for hung. There is no public call
    # that tells of a compilation; `torch.compiler.reset` drops what is registered here.
    from torch._dynamo.callback import callback_handler

    callback_handler.register_start_callback(lambda _: note("compiling"))
    callback_handler.register_end_callback(lambda _: note("compiled"))


def _probe(tensor: Tensor) -> Tensor:
    return tensor.sin() + 1.0
