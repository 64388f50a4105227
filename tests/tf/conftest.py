from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")

from tests.tf.ranks import make_devices
from tests.xdist_groups import keep_together

make_devices()


@pytest.hookimpl(wrapper=True)  # before pytest-xdist looks at the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> Iterator[None]:
    keep_together(items, ("test_memory", "test_profile", "test_compiled"))
    return (yield)
