"""What several tests of the core share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.core import fake_backend

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[fake_backend.FakeBackend]]:
    """The numpy backend, installed under the name "fake" for this process and for those that it starts."""
    site = tmp_path / "site"
    fake_backend.install(site)
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(site), str(ROOT)]))
    monkeypatch.setattr(fake_backend.FakeBackend, "reads", [])
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    yield fake_backend.FakeBackend
