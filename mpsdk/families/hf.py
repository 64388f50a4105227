"""The one door to Hugging Face directories: read a model's configuration, read its weights, write both.

The weights live in modules of their own because they need `mpsdk.description`, which itself needs `mpsdk.families.spec`.
"""

from __future__ import annotations

from mpsdk.families.export import export
from mpsdk.families.read import ReadModel, read_model
from mpsdk.families.source import HuggingFaceSource, has_weights

__all__ = ["HuggingFaceSource", "ReadModel", "export", "has_weights", "read_model"]
