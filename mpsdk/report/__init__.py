"""What a person sees of a run: progress while it trains, its history, curves and pictures.

>>> from mpsdk.report import Callback, History, Reporter, loss_curve
"""

from __future__ import annotations

from mpsdk.report.callbacks import Callback
from mpsdk.report.history import History
from mpsdk.report.pictures import loss_curve
from mpsdk.report.reporter import Reporter

__all__ = ["Callback", "History", "Reporter", "loss_curve"]
