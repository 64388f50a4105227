from __future__ import annotations

import os
from collections.abc import Sequence

import pytest

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")

from tests.tf.ranks import make_devices

make_devices()

SPREAD = ("test_parity", "test_estimate", "test_estimate_messages")  # many tests that share little


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: Sequence[pytest.Item]) -> None:
    """With several processes (`-n`, `--dist loadgroup`) a file's tests stay together, and with them what they share."""
    for item in items:
        if item.path.stem not in SPREAD and item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(item.path.stem))
