"""What several tests of the core share."""

from __future__ import annotations

from pathlib import Path

import pytest

from mpsdk.cli import main
from tests.core.command import Mpsdk, Outcome, job_in
from tests.core.fake_backend import FakeBackend, install_for
from tests.core.jobs import TEXT


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> type[FakeBackend]:
    """The numpy backend, installed under the name "fake" for this process and for those that it starts."""
    install_for(monkeypatch, tmp_path / "site")
    return FakeBackend


@pytest.fixture
def mpsdk(capfd: pytest.CaptureFixture[str]) -> Mpsdk:
    """Runs the command in this process."""

    def run(*arguments: object) -> Outcome:
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        return Outcome(int(ended.value.code or 0), *capfd.readouterr())

    return run


@pytest.fixture
def job(tmp_path: Path) -> Path:
    """A job that reads a small text, in its own directory."""
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    return job_in(tmp_path)
