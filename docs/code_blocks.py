"""A pytest plugin that runs the Python blocks of Markdown files: `pytest -p docs.code_blocks docs README.md`.

The blocks of one page share their names and run in an empty folder where `examples` is the repository's own. A block
that is not to run has the comment `% skip: next` (MyST) before it.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

from sybil import Sybil
from sybil.parsers.myst import PythonCodeBlockParser, SkipParser

ROOT = Path(__file__).resolve().parents[1]


def enter_folder(namespace: dict[str, Any]) -> None:
    folder = tempfile.TemporaryDirectory(prefix="mpsdk-docs-")
    Path(folder.name, "examples").symlink_to(ROOT / "examples")
    namespace["_folder"], namespace["_back"] = folder, Path.cwd()
    os.chdir(folder.name)


def leave_folder(namespace: dict[str, Any]) -> None:
    os.chdir(namespace["_back"])
    namespace["_folder"].cleanup()


pytest_collect_file = Sybil(
    parsers=[PythonCodeBlockParser(), SkipParser()],
    path=str(ROOT),
    patterns=["README.md", "docs/*.md"],
    setup=enter_folder,
    teardown=leave_folder,
).pytest()
