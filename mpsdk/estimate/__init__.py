"""estimate: what a Plan costs on each rank, before any device is touched."""

from mpsdk.estimate.datasheets import DATASHEETS
from mpsdk.estimate.devices import DeviceFigures, device_figures
from mpsdk.estimate.estimate import Estimate, estimate
from mpsdk.estimate.step_time import StepTime

__all__ = ["DATASHEETS", "DeviceFigures", "Estimate", "StepTime", "device_figures", "estimate"]
