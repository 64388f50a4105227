"""The PyTorch backend of mpsdk.

Names are loaded when they are used, so that `mpsdk_torch.limits` can be read without importing torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mpsdk_torch.backend import TorchBackend
    from mpsdk_torch.delayed_param import delay_param_initialization
    from mpsdk_torch.pretrained import from_config, from_pretrained
    from mpsdk_torch.transformed import transform

_HOMES = {
    "TorchBackend": "mpsdk_torch.backend",
    "delay_param_initialization": "mpsdk_torch.delayed_param",
    "from_config": "mpsdk_torch.pretrained",
    "from_pretrained": "mpsdk_torch.pretrained",
    "transform": "mpsdk_torch.transformed",
}
__all__ = ["TorchBackend", "delay_param_initialization", "from_config", "from_pretrained", "transform"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
