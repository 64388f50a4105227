"""Document: a section that can be a file by itself. YAML, JSON or a dict; all problems in one error."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Self, cast

from pydantic import ValidationError

from mpsdk.config.base import Section, problems_of, validation_error
from mpsdk.errors import ConfigError, Problem


class Document(Section):
    """A whole configuration file. Where one stands inside another, the path of its file may stand for it."""

    @classmethod
    def parse(cls, source: Self | Mapping[str, object] | str | os.PathLike[str]) -> Self:
        """One of these from itself, plain data, or the path of a YAML or JSON file.

        Raises ConfigError listing every problem. `parse(x.to_dict()) == x`.
        """
        if isinstance(source, (str, os.PathLike)):
            return cls.from_file(source)
        try:
            return cls.model_validate(source)
        except ValidationError as error:
            raise ConfigError(problems_of(error, root=cls.root()), where=f"the {cls.root()}") from None

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> Self:
        """One of these from a .yaml, .yml or .json file.

        Raises ConfigError listing every problem; for YAML with its line.
        """
        from mpsdk.config.files import read_file  # brings yaml, which a program without files does without

        file = read_file(path, root=cls.root())
        problems = list(file.problems)
        content = file.content
        if not isinstance(content, dict):
            remedy = f"the file holds no keys; it may have {', '.join(cls.model_fields)}"
            raise ConfigError([Problem(cls.root(), os.fspath(path), remedy)], where=os.fspath(path))
        try:
            document = cls.model_validate(content)
        except ValidationError as error:
            problems.extend(file.placed(problem) for problem in problems_of(error, root=cls.root()))
        else:
            if not problems:
                return document
        raise ConfigError(problems, where=os.fspath(path))

    @classmethod
    def json_schema(cls) -> dict[str, Any]:
        """The JSON schema (draft 2020-12) of the file, shorthands included, for editors and validators."""
        schema = cls.model_json_schema()
        for inner in cls.sections().values():
            if issubclass(inner, Document):
                section = schema["$defs"][inner.__name__]
                path = {
                    "type": "string",
                    "minLength": 1,
                    "description": f"The path of a {inner.root()} file.",
                }
                schema["$defs"][inner.__name__] = {"title": section["title"], "anyOf": [path, section]}
        return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}

    @classmethod
    def root(cls) -> str:
        """What messages call the whole."""
        return cls.__name__.lower()

    @classmethod
    def _keys_of(cls, data: object) -> tuple[Mapping[Any, object], bool]:
        if not isinstance(data, (str, os.PathLike)):
            return super()._keys_of(data)
        path = os.fspath(cast("str | os.PathLike[str]", data))
        try:
            return dict(cls.from_file(path)), False
        except ConfigError as error:
            problems = [
                Problem("", p.got, p.remedy)
                if p.field == cls.root()
                else Problem(p.field, p.got, f"{p.remedy}, in {path}")
                for p in error.problems
            ]
            raise validation_error(cls.__name__, problems) from None
