"""A callable that makes a user's own model, by the name that another process can import it by.

What it makes only its framework can describe. That happens in a process of its own, which shows that the callable can be
imported afresh, and leaves this process without the framework and its devices, which the workers need.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any, NamedTuple, cast

from mpsdk.backend import load_backend
from mpsdk.description import ModelDescription
from mpsdk.errors import ConfigError, Problem

NAME = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")
FRAMEWORKS = ("tensorflow",)  # whose backends describe models that they don't know
_LINES_SHOWN = 12
_MAIN = "from mpsdk.factory import main; main()"


class Factory(NamedTuple):
    """`name`: "package.module:callable". `directory`: where its package lies; workers look there too.
    `sequence_length`: that the model will be called with."""

    name: str
    directory: str
    sequence_length: int = 1

    def load(self) -> Callable[[], object]:
        """The callable. Raises ConfigError when it can't be imported."""
        make_importable(self.directory)
        module, _, path = self.name.partition(":")
        try:
            found: Any = importlib.import_module(module)
            for part in path.split("."):
                found = getattr(found, part)
        except Exception as error:  # whatever the user's module raises
            raise _refusal(self.name, f"can't be imported: {type(error).__name__}: {error}") from error
        if not callable(found):
            raise _refusal(self.name, f"is a {type(found).__name__}; name a callable that makes the model")
        return cast("Callable[[], object]", found)


def factory_of(model: str | Callable[..., object]) -> Factory:
    """The factory that `model` is, or names. Imports nothing that is not there already.

    Raises:
        ConfigError: there is no such module, or workers could not import the callable by a name.
    """
    if isinstance(model, str):
        name = model
    else:
        name = f"{model.__module__}:{model.__qualname__}"
        if model.__module__ == "__main__" or "<" in model.__qualname__:
            remedy = "can't be imported by the workers; define it at the top of a module, not in the script that runs"
            raise _refusal(name, remedy)
    package = name.partition(":")[0].partition(".")[0]
    spec = _spec(package)
    if spec is None:  # a command has not looked here, where its user is
        make_importable(os.getcwd())
        spec = _spec(package)
    if spec is None:
        raise _refusal(name, f"there is no module {package!r}, neither here nor on PYTHONPATH")
    places = [Path(place).parent for place in spec.submodule_search_locations or ()]
    if not places and spec.origin is not None:
        places = [Path(spec.origin).parent]
    return Factory(name, str(places[0].resolve()) if places else "")


def _spec(package: str) -> ModuleSpec | None:
    importlib.invalidate_caches()
    try:
        return importlib.util.find_spec(package)
    except ValueError:  # a module made by hand, with no file
        return None


def make_importable(directory: str | None) -> None:
    """Have imports look in `directory` too, after everywhere else."""
    if directory and directory not in sys.path:
        sys.path.append(directory)


def describe(factory: Factory, framework: str) -> ModelDescription:
    """What the factory makes, described by the backend of `framework` in a process of its own.

    Raises:
        ConfigError: it can't be imported or called, or makes a model that can't be trained: all reasons in one error.
    """
    with tempfile.TemporaryDirectory(prefix="mpsdk-describe-") as folder:
        answer = Path(folder, "answer.json")
        command = [sys.executable, "-c", _MAIN, framework, json.dumps(factory), str(answer)]
        without = {"TF_CONFIG", "RANK", "WORLD_SIZE", "LOCAL_RANK"}  # it is no rank
        environment = {name: value for name, value in os.environ.items() if name not in without}
        done = subprocess.run(
            command,
            env=environment | {"CUDA_VISIBLE_DEVICES": "-1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        if not answer.is_file():
            said = "\n".join(done.stdout.splitlines()[-_LINES_SHOWN:])
            raise _refusal(factory.name, f"describing it ended with exit status {done.returncode}:\n{said}")
        found: dict[str, Any] = json.loads(answer.read_text(encoding="utf-8"))
    if "problems" in found:
        raise ConfigError([Problem(*problem) for problem in found["problems"]], where="the model")
    return ModelDescription.model_validate(found["description"])


def main() -> None:
    """In a process of its own: describe what the arguments say."""
    framework, factory, answer = sys.argv[1:]
    try:
        described = load_backend(framework).describe(Factory(*json.loads(factory)))
        found: dict[str, Any] = {"description": described.model_dump(mode="json")}
    except ConfigError as error:
        found = {
            "problems": [(problem.field, str(problem.got), problem.remedy) for problem in error.problems]
        }
    Path(answer).write_text(json.dumps(found), encoding="utf-8")


def _refusal(name: str, remedy: str) -> ConfigError:
    return ConfigError([Problem("model", name, remedy)], where="the model")
