"""The PyTorch backend of mpsdk.

Names are loaded when they are used, so that `mpsdk_torch.limits` can be read without importing torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mpsdk_torch.any_model import parallelize_model, shard_model
    from mpsdk_torch.backend import TorchBackend
    from mpsdk_torch.delayed_param import delay_param_initialization
    from mpsdk_torch.pretrained import from_config, from_pretrained
    from mpsdk_torch.register import (
        set_tensor_parallelism,
        tensor_parallelism,
        tp_register,
        tp_register_with_module,
    )
    from mpsdk_torch.transformed import transform

_HOMES = {
    "TorchBackend": "mpsdk_torch.backend",
    "delay_param_initialization": "mpsdk_torch.delayed_param",
    "from_config": "mpsdk_torch.pretrained",
    "from_pretrained": "mpsdk_torch.pretrained",
    "parallelize_model": "mpsdk_torch.any_model",
    "set_tensor_parallelism": "mpsdk_torch.register",
    "shard_model": "mpsdk_torch.any_model",
    "tensor_parallelism": "mpsdk_torch.register",
    "tp_register": "mpsdk_torch.register",
    "tp_register_with_module": "mpsdk_torch.register",
    "transform": "mpsdk_torch.transformed",
}
__all__ = [
    "TorchBackend",
    "delay_param_initialization",
    "from_config",
    "from_pretrained",
    "parallelize_model",
    "set_tensor_parallelism",
    "shard_model",
    "tensor_parallelism",
    "tp_register",
    "tp_register_with_module",
    "transform",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
