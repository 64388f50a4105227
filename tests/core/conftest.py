"""What several tests of the core share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.core.fake_backend import FakeBackend, install_for


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> type[FakeBackend]:
    """The numpy backend, installed under the name "fake" for this process and for those that it starts."""
    install_for(monkeypatch, tmp_path / "site")
    return FakeBackend
