"""How tests are shared out between processes (`-n 2 --dist loadgroup`)."""

from __future__ import annotations

from collections.abc import Collection

import pytest


def keep_together(items: list[pytest.Item], files: Collection[str]) -> None:
    """Have the tests of each of `files` run in one process, since they share what takes long to make, and before others: what
    comes last should be short."""
    for item in items:
        if item.path.stem in files and item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(item.path.stem))
    items.sort(key=lambda item: item.path.stem not in files)
