"""`import mpsdk` is cheap and brings no framework along."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FRAMEWORKS = ("torch", "tensorflow", "keras", "transformers", "jax")
HEAVY = ("matplotlib", "tensorboard", "datasets", "pandas", "rich")
BUDGET = 0.3  # seconds
TRIES = 5  # the best of them counts: the machine may be busy with something else


def python(code: str) -> str:
    """What a fresh interpreter prints."""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def modules_after(code: str) -> set[str]:
    """The top-level modules that `code` leaves in a fresh interpreter."""
    printed = python(
        f"{code}\nimport sys\nprint(*sorted({{name.partition('.')[0] for name in sys.modules}}))"
    )
    return set(printed.split())


def test_import_takes_less_than_its_budget() -> None:
    measure = "import time; start = time.perf_counter(); import mpsdk; print(time.perf_counter() - start)"
    seconds = min(float(python(measure)) for _ in range(TRIES))
    assert seconds < BUDGET


def test_import_brings_neither_a_framework_nor_anything_heavy() -> None:
    assert modules_after("import mpsdk").isdisjoint({*FRAMEWORKS, *HEAVY})


@pytest.mark.parametrize(
    "code",
    [
        "from mpsdk import Distribution, Estimator, Run, Training",
        "import mpsdk.backend",
        "import mpsdk_torch.limits",
        "import mpsdk_tf.limits",
    ],
)
def test_the_facade_and_the_limits_bring_no_framework(code: str) -> None:
    assert modules_after(code).isdisjoint(FRAMEWORKS)


def test_public_names_are_importable_and_listed() -> None:
    import mpsdk

    for name in mpsdk.__all__:
        assert getattr(mpsdk, name) is not None
        assert name in dir(mpsdk)


def test_an_unknown_name_is_an_attribute_error_that_says_which() -> None:
    import mpsdk

    with pytest.raises(AttributeError, match="'Estimater'"):
        _ = mpsdk.Estimater  # type: ignore[attr-defined]
