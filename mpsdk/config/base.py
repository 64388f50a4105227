"""Section: the frozen, strict model that every part of a configuration is, and how its mistakes are told.

A section reports all that is wrong with it at once: unknown keys, values of the wrong kind, and the rules
between fields, which still speak about the fields that are right when others are not. pydantic alone would
stop before the rules. Every text is made here: `Pipeline(...)` and `Distribution.parse(...)` say the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self, cast

from pydantic import (
    BaseModel,
    ConfigDict,
    GetJsonSchemaHandler,
    ModelWrapValidatorHandler,
    ValidationError,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, InitErrorDetails, PydanticCustomError

from mpsdk.config.wording import closest, field_accepts, hint
from mpsdk.errors import Problem

_PROBLEM = "mpsdk_config"


@dataclass(frozen=True)
class Rule:
    """A rule between fields of a section. Its text stands in the generated reference."""

    needs: frozenset[str]
    check: Callable[[Any], Iterable[Problem]]
    text: str


def rule(*needs: str) -> Callable[[Callable[[Any], Iterable[Problem]]], Rule]:
    """Make a method of a section a Rule, checked when each of the fields `needs` is valid by itself.

    The method yields a Problem for each breach, its field relative to the section; its docstring is the text.
    """

    def decorate(check: Callable[[Any], Iterable[Problem]]) -> Rule:
        return Rule(frozenset(needs), check, (check.__doc__ or "").strip())

    return decorate


class Section(BaseModel):
    """A part of a configuration. Every field has a default and a description with units.

    `shorthand` names the field that a bare value stands for: `pipeline: 2` is `pipeline: {degree: 2}`.
    `foreign` maps keys that other tools know to what to do about them here.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, ignored_types=(Rule,)
    )

    shorthand: ClassVar[str | None] = None
    foreign: ClassVar[Mapping[str, str]] = {}
    rules: ClassVar[tuple[Rule, ...]] = ()

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: object) -> None:
        super().__pydantic_init_subclass__(**kwargs)
        cls.rules = (*cls.rules, *(value for value in vars(cls).values() if isinstance(value, Rule)))

    def to_dict(self) -> dict[str, Any]:
        """Plain data that JSON can hold, every field stated."""
        return self.model_dump(mode="json")

    def changed(self, name: str) -> bool:
        """Whether field `name` differs from its default. Stating the default asks for nothing."""
        return getattr(self, name) != type(self).model_fields[name].default

    @classmethod
    def summary(cls) -> str:
        """The first paragraph of the docstring, on one line."""
        return " ".join((cls.__doc__ or "").partition("\n\n")[0].split())

    @classmethod
    def sections(cls) -> dict[str, type[Section]]:
        """The fields that are sections themselves."""
        found = {name: section_of(field) for name, field in cls.model_fields.items()}
        return {name: section for name, section in found.items() if section is not None}

    @model_validator(mode="wrap")
    @classmethod
    def _validate(cls, data: object, handler: ModelWrapValidatorHandler[Self]) -> Self:
        if isinstance(data, cls):
            return data
        given, bare = cls._keys_of(data)
        known = {key: value for key, value in given.items() if key in cls.model_fields}
        strays = {key: value for key, value in given.items() if key not in cls.model_fields}
        lines = [_init_error((str(key),), value, cls._unknown(key)) for key, value in strays.items()]
        refused: set[str] = set()
        try:
            section = handler(known)
        except ValidationError as error:
            for line in error.errors(include_url=False):
                name = str(line["loc"][0])
                if line["type"] == _PROBLEM:  # a section inside this one has worded it already
                    lines.append(_init_error(line["loc"], line["input"], line["msg"]))
                elif name not in refused:  # pydantic has one error for each option of a union; one will do
                    remedy = cls._refusal(name, known[name], bare=bare)
                    lines.append(_init_error(() if bare else (name,), known[name], remedy))
                refused.add(name)
            section = handler({key: value for key, value in known.items() if key not in refused})
        # A rule on a field whose name was misspelled would speak about its default, which is not what was meant.
        silent = refused | {closest(str(key), cls.model_fields) for key in strays}
        for broken in cls.rules:
            if silent.isdisjoint(broken.needs):
                lines.extend(_line(problem) for problem in broken.check(section))
        if lines:
            raise ValidationError.from_exception_data(cls.__name__, lines)
        return section

    @classmethod
    def _keys_of(cls, data: object) -> tuple[Mapping[Any, object], bool]:
        """`data` as keys and values, and whether it was a bare value."""
        if isinstance(data, Mapping):
            return cast(Mapping[Any, object], data), False
        if cls.shorthand is not None:
            return {cls.shorthand: data}, True
        remedy = f"must be a section with keys {', '.join(cls.model_fields)}"
        raise validation_error(cls.__name__, [Problem("", data, remedy)])

    @classmethod
    def _refusal(cls, name: str, value: object, *, bare: bool) -> str:
        field = cls.model_fields[name]
        section = (f"a section with keys {', '.join(cls.model_fields)}",) if bare else ()
        return f"must be {field_accepts(field, *section)}{hint(value, field)}"

    @classmethod
    def _unknown(cls, key: object) -> str:
        word = str(key)
        if word in cls.foreign:
            return cls.foreign[word]
        inside = [f"{name}.{word}" for name, inner in cls.sections().items() if word in inner.model_fields]
        if inside:
            return f"unknown key here; did you mean {' or '.join(inside)}?"
        near = closest(word, cls.model_fields)
        if near is not None:
            return f"unknown key; did you mean {near}?"
        return f"unknown key; the keys here are {', '.join(cls.model_fields)}"

    @classmethod
    def __get_pydantic_json_schema__(
        cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        reference = handler(core_schema)
        schema = handler.resolve_ref_schema(reference)
        schema["description"] = cls.summary()
        if cls.shorthand is not None:
            section = dict(schema)
            field = section["properties"][cls.shorthand]
            bare = {key: value for key, value in field.items() if key not in ("default", "title")}
            schema.clear()
            schema.update(title=section["title"], description=section["description"], anyOf=[bare, section])
        return reference


def section_of(field: FieldInfo) -> type[Section] | None:
    """The section that `field` holds, None when it holds plain values."""
    annotation = field.annotation
    return annotation if isinstance(annotation, type) and issubclass(annotation, Section) else None


def problems_of(error: ValidationError, *, root: str = "configuration") -> list[Problem]:
    """What `error` says, as problems with dotted fields. `root` names what is wrong as a whole."""
    return [
        Problem(".".join(map(str, line["loc"])) or root, line["input"], line["msg"])
        for line in error.errors(include_url=False)
    ]


def validation_error(title: str, problems: Iterable[Problem]) -> ValidationError:
    """The reverse of `problems_of`, for a section to raise. An empty field stands for the section itself."""
    return ValidationError.from_exception_data(title, [_line(problem) for problem in problems])


def _line(problem: Problem) -> InitErrorDetails:
    return _init_error(tuple(problem.field.split(".")) if problem.field else (), problem.got, problem.remedy)


def _init_error(location: tuple[str | int, ...], got: object, remedy: str) -> InitErrorDetails:
    # pydantic takes locations as Unicode text, which a key with a lone surrogate is not.
    readable = tuple(str(part).encode("utf-8", "backslashreplace").decode() for part in location)
    kind = PydanticCustomError(_PROBLEM, "{remedy}", {"remedy": remedy})
    return InitErrorDetails(type=kind, loc=readable, input=got)
