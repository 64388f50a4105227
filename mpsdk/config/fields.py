"""The types of plain fields: a name for each constraint that several fields share."""

from __future__ import annotations

import os
from typing import Annotated, cast

from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic import BeforeValidator

from mpsdk.config.wording import Accepts


def _tuple_of(value: object) -> object:
    """YAML and JSON have no tuples, strict validation takes nothing else. Only lists: a set has no order."""
    return tuple(cast("list[object]", value)) if isinstance(value, list) else value


def _text_of(value: object) -> object:
    return os.fspath(cast("os.PathLike[str]", value)) if isinstance(value, os.PathLike) else value


ListAsTuple = BeforeValidator(_tuple_of)

Count = Annotated[int, Ge(1)]
Natural = Annotated[int, Ge(0)]
Seed = Annotated[int, Ge(0), Le(2**63 - 1)]
Positive = Annotated[float, Gt(0)]
NotNegative = Annotated[float, Ge(0)]
Fraction = Annotated[float, Ge(0), Le(1)]
Share = Annotated[float, Gt(0), Lt(1)]
BelowOne = Annotated[float, Ge(0), Lt(1)]
Text = Annotated[str, MinLen(1)]
PathText = Annotated[str, MinLen(1), BeforeValidator(_text_of), Accepts("a path")]
