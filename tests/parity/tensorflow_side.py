"""What the process with TensorFlow does for a test. Importing this module imports no framework."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpsdk.plan import Plan
from tests.cases import Outcome


def begin() -> None:
    """Once, before all else."""
    from tests.tf.ranks import make_devices

    make_devices()


def train(plan: Plan, steps: int) -> Outcome:
    """What rank 0 of a training from the plan's own initial weights saw."""
    from tests.tf import cases, ranks

    return ranks.run(plan.world_size, cases.train, plan, steps)[0]


def train_from_directory(plan: Plan, directory: str, steps: int) -> Outcome:
    """The same from the weights of a Hugging Face directory."""
    from tests.tf import cases, ranks

    return ranks.run(plan.world_size, cases.train_from_directory, plan, directory, steps)[0]


def logits(directory: str, ids: NDArray[np.int32]) -> NDArray[Any]:
    """Those of the Keras model that has the weights of a Hugging Face directory."""
    from mpsdk_tf import from_pretrained

    return np.asarray(from_pretrained(directory)(ids))
