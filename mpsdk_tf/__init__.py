"""The TensorFlow backend of mpsdk.

Names are loaded when they are used, so that `mpsdk_tf.limits` can be read without importing tensorflow.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mpsdk_tf.backend import TensorFlowBackend
    from mpsdk_tf.pretrained import from_checkpoint, from_config, from_pretrained
    from mpsdk_tf.register import (
        set_tensor_parallelism,
        tensor_parallelism,
        tp_register,
        tp_register_with_module,
    )
    from mpsdk_tf.twins import tensor_group

_HOMES = {
    "TensorFlowBackend": "mpsdk_tf.backend",
    "from_checkpoint": "mpsdk_tf.pretrained",
    "from_config": "mpsdk_tf.pretrained",
    "from_pretrained": "mpsdk_tf.pretrained",
    "set_tensor_parallelism": "mpsdk_tf.register",
    "tensor_group": "mpsdk_tf.twins",
    "tensor_parallelism": "mpsdk_tf.register",
    "tp_register": "mpsdk_tf.register",
    "tp_register_with_module": "mpsdk_tf.register",
}
__all__ = [
    "TensorFlowBackend",
    "from_checkpoint",
    "from_config",
    "from_pretrained",
    "set_tensor_parallelism",
    "tensor_group",
    "tensor_parallelism",
    "tp_register",
    "tp_register_with_module",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
