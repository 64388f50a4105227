"""What is shipped, and that the commands in the README are the ones that CI and nox know."""

from __future__ import annotations

import configparser
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    (path,) = folder.glob("*.whl")
    return zipfile.ZipFile(path)


def test_wheel_holds_three_typed_packages_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    names = wheel.namelist()
    packages = {name.partition("/")[0] for name in names if ".dist-info/" not in name}
    assert packages == {"mpsdk", "mpsdk_torch", "mpsdk_tf"}
    assert {f"{package}/py.typed" for package in packages} <= set(names)


def test_wheel_names_the_command_and_the_backends(wheel: zipfile.ZipFile) -> None:
    (entry_points,) = (name for name in wheel.namelist() if name.endswith("entry_points.txt"))
    entries = configparser.ConfigParser()
    entries.read_string(wheel.read(entry_points).decode())
    assert entries["console_scripts"]["mpsdk"] == "mpsdk.cli:main"
    assert dict(entries["mpsdk.backends"]) == {
        "torch": "mpsdk_torch.backend:TorchBackend",
        "tensorflow": "mpsdk_tf.backend:TensorFlowBackend",
    }
    assert dict(entries["mpsdk.limits"]) == {
        "torch": "mpsdk_torch.limits:limits",
        "tensorflow": "mpsdk_tf.limits:limits",
    }


def test_wheel_carries_the_licence(wheel: zipfile.ZipFile) -> None:
    (licence,) = (name for name in wheel.namelist() if name.endswith("licenses/LICENSE"))
    assert wheel.read(licence).decode() == (ROOT / "LICENSE").read_text(encoding="utf-8")


def test_ci_runs_the_test_command_of_the_readme() -> None:
    commands = re.findall(r"^python3 -m venv .*nox.*$", (ROOT / "README.md").read_text(), re.MULTILINE)
    main_job, tests, other_framework = commands
    assert main_job.endswith("nox -s quickstart")
    assert other_framework.endswith("nox -s quickstart-tf")
    assert tests in (ROOT / ".ci" / "run").read_text()


def test_constraints_are_exact_and_come_from_no_particular_place() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][A-Za-z0-9.]*", pin) for pin in pins)
    assert {"torch==2.13.0", "tensorflow-cpu==2.21.0", "keras==3.15.1"} <= set(pins)
