"""mpsdk: one distribution config, one plan, two frameworks.

The public names are imported when they are first used, so that `import mpsdk` costs little and pulls in no framework:

    >>> import mpsdk
    >>> distribution = mpsdk.Distribution(tensor_parallel=2, pipeline=2)
    >>> distribution.stated_degree
    4
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mpsdk.config import Distribution, Training
    from mpsdk.estimator import Estimator
    from mpsdk.report.compare import compare
    from mpsdk.run import Run

__version__ = "0.1.0"
__all__ = ["Distribution", "Estimator", "Run", "Training", "__version__", "compare"]

_HOME = {
    "Distribution": "mpsdk.config",
    "Estimator": "mpsdk.estimator",
    "Run": "mpsdk.run",
    "Training": "mpsdk.config",
    "compare": "mpsdk.report.compare",
}


def __getattr__(name: str) -> object:
    """Import a public name on first use (PEP 562) and keep it."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
