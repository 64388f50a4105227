from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest

from tests.parity import tensorflow_side
from tests.torch.pool import WorkerPool

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")


@pytest.fixture(scope="session")
def pool() -> Iterator[WorkerPool]:
    """Ranks in PyTorch."""
    workers = WorkerPool(8)
    yield workers
    workers.close()


@pytest.fixture(scope="session")
def tensorflow() -> Iterator[ProcessPoolExecutor]:
    """A process with TensorFlow, which this one never imports: two frameworks' threads in one process wait for each other."""
    with ProcessPoolExecutor(1, get_context("spawn"), initializer=tensorflow_side.begin) as process:
        yield process
