"""The PyTorch backend of mpsdk.

Names are loaded when they are used, so that `mpsdk_torch.limits` can be read without importing torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mpsdk_torch.backend import TorchBackend
    from mpsdk_torch.pretrained import from_config, from_pretrained

_HOMES = {
    "TorchBackend": "mpsdk_torch.backend",
    "from_config": "mpsdk_torch.pretrained",
    "from_pretrained": "mpsdk_torch.pretrained",
}
__all__ = ["TorchBackend", "from_config", "from_pretrained"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
