"""The files that a path stands for, and a name for what is in them."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path

from mpsdk.data import faults as fault
from mpsdk.data.faults import Faults
from mpsdk.errors import DataError

log = logging.getLogger(__name__)

NOTES = ("README", "LICENSE", "NOTICE")  # may lie beside a corpus without a warning


def find_files(path: Path, suffixes: Sequence[str], *, accepted: str) -> tuple[Path, ...]:
    """`path`, or all files of these suffixes in it and below, in the order of their paths.

    Raises DataError when there is none; `accepted` says what there might be instead.
    """
    kinds = f"{', '.join(suffixes[:-1])} or {suffixes[-1]}"
    if path.is_dir():
        found = sorted(
            (
                Path(folder, name)
                for folder, _, names in os.walk(path)
                for name in names
                if not name.startswith(".")
            ),
            key=lambda file: file.relative_to(path).as_posix(),
        )
        files = tuple(file for file in found if file.suffix.lower() in suffixes)
        if not files:
            raise DataError(f"{path} has no {kinds} file in it or below")
        others = [str(file.relative_to(path)) for file in found if file.suffix.lower() not in suffixes]
        if left_out := [name for name in others if not Path(name).name.startswith(NOTES)]:
            log.warning("%s: not read, no %s: %s", path, kinds, ", ".join(left_out))
        return files
    if not path.exists():
        raise DataError(f"{path} does not exist; pass {accepted}")
    if path.suffix.lower() not in suffixes:
        raise DataError(f"{path} does not end in {kinds}; pass {accepted}")
    return (path,)


def digest_of_files(files: tuple[Path, ...], name: str, columns: tuple[str, ...]) -> str:
    """Names what is in `files`, and of tables which `columns` are read. Raises DataError listing what can't be read."""
    faults = Faults(name)
    contents: list[tuple[str, tuple[str, ...] | None, str]] = []
    for file in files:
        suffix = file.suffix.lower()
        try:
            with file.open("rb") as stream:
                content = hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=32)).hexdigest()
        except OSError:
            faults.add(str(file), fault.UNREADABLE)
            continue
        contents.append((suffix, None if suffix == ".txt" else columns, content))
    faults.raise_if_any()
    return hashlib.blake2b(json.dumps(contents).encode(), digest_size=16).hexdigest()


def decoded(line: bytes) -> str | None:
    """The text of `line`, or None where it is not UTF-8."""
    try:
        return line.decode()
    except UnicodeDecodeError:
        return None


def note_not_utf8(file: Path, faults: Faults) -> None:
    """Note every line of `file` that is not UTF-8."""
    with file.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            if decoded(line) is None:
                faults.add(str(file), fault.NOT_UTF8, number)
