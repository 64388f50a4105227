from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.torch.pool import WorkerPool


@pytest.fixture(scope="session")
def pool() -> Iterator[WorkerPool]:
    workers = WorkerPool(8)
    yield workers
    workers.close()
