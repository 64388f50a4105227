"""estimate: what a Plan costs on each rank, before any device is touched."""

from mpsdk.estimate.estimate import Estimate, estimate

__all__ = ["Estimate", "estimate"]
