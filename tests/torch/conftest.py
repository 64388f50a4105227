from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.torch.pool import WorkerPool
from tests.xdist_groups import keep_together


@pytest.hookimpl(wrapper=True)  # before pytest-xdist looks at the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> Iterator[None]:
    keep_together(items, ("test_profile", "test_compiled"))
    return (yield)


@pytest.fixture(scope="session")
def pool() -> Iterator[WorkerPool]:
    workers = WorkerPool(8)
    yield workers
    workers.close()
