"""What the user asks for: Distribution, Training and Job, their sections, and how their mistakes are told."""

from __future__ import annotations

from mpsdk.config.base import Section, problems_of
from mpsdk.config.distribution import (
    ActivationCheckpointing,
    Checkpoint,
    Compile,
    Distribution,
    Pipeline,
    Precision,
    ShardedDataParallel,
    TensorParallel,
)
from mpsdk.config.document import Document
from mpsdk.config.job import Data, Job, Launch
from mpsdk.config.profile import Profile
from mpsdk.config.training import Training

__all__ = [
    "ActivationCheckpointing",
    "Checkpoint",
    "Compile",
    "Data",
    "Distribution",
    "Document",
    "Job",
    "Launch",
    "Pipeline",
    "Precision",
    "Profile",
    "Section",
    "ShardedDataParallel",
    "TensorParallel",
    "Training",
    "problems_of",
]
