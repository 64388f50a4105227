"""What a field accepts, in words: the one text that error messages and the generated reference share."""

from __future__ import annotations

import math
import types
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from typing import Annotated, Literal, Union, get_args, get_origin

import annotated_types
from pydantic.fields import FieldInfo


class Accepts:
    """Metadata of an `Annotated` type whose values no type can describe: what it accepts, in words."""

    def __init__(self, *choices: str) -> None:
        self.choices = choices


def field_accepts(field: FieldInfo, *others: str) -> str:
    """What `field` accepts, and `others` beside, in words: `an integer >= 1, or "fill"`."""
    *first, last = (*_choices(field.annotation, field.metadata), *others)
    return " or ".join([", ".join(first) + "," * (len(first) > 1), last]) if first else last


def _choices(annotation: object, metadata: Sequence[object] = ()) -> tuple[str, ...]:
    """Each thing that a value of type `annotation` under the constraints `metadata` may be, in words."""
    for item in reversed(metadata):
        if isinstance(item, Accepts):
            return item.choices
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _choices(arguments[0], (*arguments[1:], *metadata))
    if origin in (Union, types.UnionType):
        return tuple(choice for option in arguments for choice in _choices(option, metadata))
    if origin is Literal:
        return tuple(f'"{value}"' for value in arguments)
    if origin is tuple:
        length = "" if arguments[-1] is Ellipsis else f" of {len(arguments)}"
        return (f"a list{length}, each {' or '.join(_choices(arguments[0]))}",)
    if annotation is int:
        return (f"an integer{_bounds(metadata)}",)
    if annotation is float:
        return (f"a number{_bounds(metadata)}",)
    if annotation is bool:
        return ("True", "False")
    return ("None",) if annotation is types.NoneType else ("a string",)


def hint(value: object, field: FieldInfo) -> str:
    """What was probably meant by a `value` that `field` refused, as half a sentence; empty if unclear."""
    kinds = set(_leaves(field.annotation))
    if value is None:
        return "; leave the key out for the default"
    if isinstance(value, str):
        near = closest(value, [choice for choice in kinds if isinstance(choice, str)])
        if near is not None:
            return f'; did you mean "{near}"?'
        if kinds & {int, float} and _is_number(value):
            return "; write it without quotes"
        if bool in kinds and value.lower() in ("true", "false"):
            return "; write it without quotes"
    if isinstance(value, float) and not math.isfinite(value):
        return "; it must be finite"
    if isinstance(value, float) and value.is_integer() and int in kinds:
        return f"; write {int(value)}"
    if hasattr(value, "__index__") and not isinstance(value, int) and int in kinds:
        return "; convert it with int()"  # numpy's integers
    return ""


def closest(word: str, choices: Iterable[str]) -> str | None:
    """The choice that `word` was most likely meant to be, whatever its case; None when none is near."""
    lowered = {choice.lower(): choice for choice in choices}
    # A word longer than any name is no misspelling of one, and difflib is quadratic.
    found = get_close_matches(word[:64].lower(), sorted(lowered), n=1)
    return lowered[found[0]] if found else None


def _bounds(metadata: Sequence[object]) -> str:
    low = high = ""
    for item in metadata:
        match item:
            case annotated_types.Ge(ge=bound):
                low = f">= {bound}"
            case annotated_types.Gt(gt=bound):
                low = f"> {bound}"
            case annotated_types.Le(le=bound):
                high = f"<= {bound}"
            case annotated_types.Lt(lt=bound):
                high = f"< {bound}"
            case _:
                pass
    text = " and ".join(bound for bound in (low, high) if bound)
    return f" {text}" if text else ""


def _leaves(annotation: object) -> Iterable[object]:
    """The plain types and literal strings that a top-level value of type `annotation` may be."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        yield from _leaves(arguments[0])
    elif origin in (Union, types.UnionType):
        for option in arguments:
            yield from _leaves(option)
    elif origin is Literal:
        yield from arguments
    elif origin is None:
        yield annotation


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
