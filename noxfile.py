"""What can be run on this repository. `nox` alone runs what CI runs; `nox -l` lists every session.

`lint` and `core` have small environments of their own, without a framework. Every session that needs one works in
one shared environment, because PyTorch and transformers take minutes to install. Words after `--` go to the
session's main command: `nox -s core -- -k partition`.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import nox

nox.options.default_venv_backend = "venv"
nox.options.sessions = ["lint", "core", "types", "torch", "docs"]
nox.options.error_on_missing_interpreters = True

PINNED = ("-c", "constraints.txt")
EXTRAS = nox.project.load_toml("pyproject.toml")["project"]["optional-dependencies"]
SHARED = Path(".nox", "shared")
QUIET = {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "PYTHONFAULTHANDLER": "1"}


def shared(session: nox.Session, *extras: str) -> str:
    """The Python of the shared environment, with mpsdk and `extras` installed in it. Made at the first call."""
    python = SHARED.resolve() / ("Scripts" if os.name == "nt" else "bin") / "python"
    if not python.exists():
        session.run(sys.executable, "-m", "venv", str(SHARED))
    project = f".[{','.join(extras)}]"
    session.run(str(python), "-m", "pip", "install", "-q", *PINNED, "-e", project)
    return str(python)


@nox.session
def lint(session: nox.Session) -> None:
    """Style, formatting, and which room may import which."""
    session.install("-q", *PINNED, *EXTRAS["lint"])
    session.run("ruff", "check", *session.posargs)
    session.run("ruff", "format", "--check")
    session.run("lint-imports", "--no-cache")


@nox.session
def core(session: nox.Session) -> None:
    """The neutral core, where no framework is installed."""
    session.install("-q", *PINNED, "-e", ".[test]")
    options = (
        "-n",
        "2",
        "--dist",
        "loadgroup",
        "--cov=mpsdk",
        "--cov-report=term",
        "-m",
        "not long and not hf",
    )
    session.run("pytest", "tests/core", *options, *session.posargs, env=QUIET)


@nox.session(venv_backend="none")
def types(session: nox.Session) -> None:
    """Pyright: strict in the core, basic elsewhere."""
    python = shared(session, "torch", "hf", "bench", "types")
    session.run(python, "-m", "pyright", "-p", "pyproject.toml", "--pythonpath", python, *session.posargs)


@nox.session(venv_backend="none")
def torch(session: nox.Session) -> None:
    """The PyTorch backend, the launcher's real processes, and what the core can only show where a framework is there."""
    python = shared(session, "torch", "hf", "test")
    run = (python, "-m", "pytest")
    coverage = ("--cov=mpsdk_torch", "--cov=mpsdk", "--cov-report=term")
    tests = ("tests/torch", "tests/launch", "tests/core/test_import.py")
    session.run(*run, *tests, *coverage, *session.posargs, env=QUIET)
    session.run(*run, "tests/core", "-m", "hf and not long", *session.posargs, env=QUIET)


@nox.session(venv_backend="none", default=False)
def long(session: nox.Session) -> None:
    """The tests marked `long`, everywhere."""
    python = shared(session, "torch", "hf", "test")
    session.run(python, "-m", "pytest", "-m", "long", *session.posargs, env=QUIET)


@nox.session(venv_backend="none")
def docs(session: nox.Session) -> None:
    """Build the documentation, warnings as errors, and run the code in it."""
    python = shared(session, "torch", "hf", "docs")
    session.run(python, "-m", "sphinx", "-q", "-W", "--keep-going", "docs", "build/docs")
    blocks = ("-p", "docs.code_blocks", "docs", "README.md")
    session.run(python, "-m", "pytest", *blocks, *session.posargs, env=QUIET)


@nox.session(venv_backend="none", default=False)
def quickstart(session: nox.Session) -> None:
    """The main job: train GPT-2 as 2 pipeline stages x 2 tensor parallel ranks, export it, load it in transformers."""
    python = shared(session, "torch", "hf")
    session.run(python, "examples/quickstart.py", *session.posargs, env=QUIET)


@nox.session(venv_backend="none", default=False)
def tf(session: nox.Session) -> None:
    """The TensorFlow backend. Nothing yet."""
    session.skip("the TensorFlow backend does not exist yet: nothing was tested")


@nox.session(venv_backend="none", default=False)
def parity(session: nox.Session) -> None:
    """Both frameworks against each other. Nothing yet."""
    session.skip("there is one backend so far and nothing to compare it with: nothing was tested")


@nox.session(venv_backend="none", default=False)
def bench(session: nox.Session) -> None:
    """Speed and memory beside other libraries', and step times beside predicted ones: half an hour on a quiet machine."""
    python = shared(session, "torch", "hf", "bench")
    session.run(python, "-m", "benchmarks", *session.posargs, env=QUIET)
