from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.torch.pool import WorkerPool
from tests.xdist_groups import keep_together


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    keep_together(items, ("test_run", "test_profile", "test_compiled"))


@pytest.fixture(scope="session")
def pool() -> Iterator[WorkerPool]:
    workers = WorkerPool(8)
    yield workers
    workers.close()
