"""Reading a configuration file: YAML or JSON into plain data, twice-given keys told, lines remembered."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, cast

import yaml

from mpsdk.errors import ConfigError, Problem

_TWICE = "the key stands twice in its section, and only one value can hold; remove one"


@dataclass(frozen=True)
class FileContent:
    """A file's content, what is wrong with its form, and the line of each dotted key (YAML only)."""

    content: object
    problems: tuple[Problem, ...] = ()
    lines: dict[str, int] = field(default_factory=dict[str, int])

    def placed(self, problem: Problem) -> Problem:
        """`problem` with the line on which its field stands, or else the nearest section around it."""
        path = problem.field
        while path and path not in self.lines:
            path = path.rpartition(".")[0]
        if not path:
            return problem
        return Problem(problem.field, problem.got, f"{problem.remedy} (line {self.lines[path]})")


def read_file(path: str | os.PathLike[str], *, root: str) -> FileContent:
    """The content of the YAML or JSON file at `path`. Raises ConfigError, for field `root`, if unreadable."""
    file = Path(path)
    try:
        return _reader(file)(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        remedy = f"there is no such file, looking from {Path.cwd()}"
    except OSError as error:
        remedy = f"the file can't be read: {error.strerror}"
    except RecursionError:
        remedy = "the file is nested too deeply"
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        remedy = f"not valid YAML{place}: {' '.join(filter(None, (error.context, error.problem)))}"
    except (ValueError, yaml.YAMLError) as error:  # bad JSON, text that is not UTF-8, a date of month 13, ...
        remedy = f"the file can't be read: {error}"
    raise ConfigError([Problem(root, str(file), remedy)], where=str(file))


def _reader(file: Path) -> Callable[[str], FileContent]:
    readers = {".yaml": _read_yaml, ".yml": _read_yaml, ".json": _read_json}
    reader = readers.get(file.suffix.lower())
    if reader is None:
        raise ValueError(f"its name must end in one of {', '.join(readers)}")
    return reader


def _read_json(text: str) -> FileContent:
    problems: list[Problem] = []

    def section(pairs: list[tuple[str, object]]) -> dict[str, object]:
        found: dict[str, object] = {}
        for key, value in pairs:
            if key in found:
                problems.append(Problem(key, value, _TWICE))
            found[key] = value
        return found

    return FileContent(json.loads(text, object_pairs_hook=section), tuple(problems))


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, for which `3e-4` is a number: YAML 1.1 wants `3.0e-4`, YAML 1.2 does not."""

    def value_of(self, node: yaml.Node) -> object:
        return cast(Any, self).construct_document(node)


cast(Any, _Loader).add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]+$"),
    list("-+.0123456789"),
)


def _read_yaml(text: str) -> FileContent:
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return FileContent(None)
        keys = list(_keys(node, "", set()))
        content = loader.value_of(node)
        twice = [
            Problem(key.path, loader.value_of(key.value), f"{_TWICE} (line {key.line})")
            for key in keys
            if key.again
        ]
        return FileContent(content, tuple(twice), {key.path: key.line for key in keys})
    finally:
        loader.dispose()


class _Key(NamedTuple):
    path: str
    line: int
    value: yaml.Node
    again: bool  # its mapping had it before


def _keys(node: yaml.Node, path: str, seen: set[int]) -> Iterator[_Key]:
    """Every plain key under `node`, which stands at the dotted `path`.

    `seen` holds the ids of the nodes met so far: an alias is read once, and a node that holds itself ends.
    """
    if id(node) in seen:
        return
    seen.add(id(node))
    prefix = f"{path}." if path else ""
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            yield from _keys(item, f"{prefix}{index}", seen)
    elif isinstance(node, yaml.MappingNode):
        here: set[str] = set()
        for key, value in list(node.value):
            if isinstance(key, yaml.ScalarNode):
                yield _Key(f"{prefix}{key.value}", key.start_mark.line + 1, value, key.value in here)
                here.add(key.value)
                yield from _keys(value, f"{prefix}{key.value}", seen)
