from __future__ import annotations

import math
import subprocess
import sys

import pytest

from mpsdk.errors import DataError
from mpsdk.report import loss_curve


def rows(count: int) -> list[dict]:
    return [
        {"step": step, "loss": 2 + math.exp(-step / 20), "learning_rate": 1e-3 / step}
        for step in range(1, count)
    ]


@pytest.mark.parametrize("count", [2, 3, 200])
def test_picture_comes_as_png_and_svg(tmp_path, count):
    history = [*rows(count), {"step": count, "validation_loss": 2.125}, {"step": count, "loss": math.nan}]
    png, svg = loss_curve(history, tmp_path / "loss.png", "A title", unigram_entropy=2.875)
    assert png.read_bytes().startswith(b"\x89PNG") and png.stat().st_size > 10_000
    text = svg.read_text()
    assert all(
        label in text for label in ("A title", "validation 2.125", "unigram entropy 2.875", "learning rate")
    )


def test_same_history_gives_the_same_svg(tmp_path):
    first, second = (loss_curve(rows(30), tmp_path / name)[1] for name in ("one", "two"))
    assert first.read_bytes() == second.read_bytes()


def test_history_without_a_loss_is_refused(tmp_path):
    with pytest.raises(DataError, match="no loss to draw: 1 rows"):
        loss_curve([{"step": 1, "loss": math.inf}], tmp_path / "loss.png")
    assert list(tmp_path.iterdir()) == []


def test_importing_the_room_loads_nothing_heavy():
    heavy = ("matplotlib", "rich", "tensorboard", "torch", "tensorflow")
    program = f"import mpsdk.report, mpsdk.launch, sys; print([n for n in {heavy} if n in sys.modules])"
    output = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    ).stdout
    assert output.strip() == "[]"
