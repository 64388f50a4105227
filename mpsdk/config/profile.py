"""Profile: which steps of a run are traced and timed, and on which ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, ClassVar, Literal, cast

from annotated_types import MinLen
from pydantic import BeforeValidator, Field, WithJsonSchema

from mpsdk.config.base import Section, rule
from mpsdk.config.fields import Count, ListAsTuple, Natural
from mpsdk.config.wording import Accepts
from mpsdk.errors import Problem


def _one_or_several(value: object) -> object:
    if isinstance(value, list):
        return tuple(cast("list[object]", value))
    return (value,) if isinstance(value, int) and not isinstance(value, bool) else value


_COUNT = {"type": "integer", "minimum": 1}
Steps = Annotated[
    Annotated[tuple[Count, ...], MinLen(1)] | None,
    BeforeValidator(_one_or_several),
    WithJsonSchema({"anyOf": [_COUNT, {"type": "array", "items": _COUNT, "minItems": 1}, {"type": "null"}]}),
    Accepts("an integer >= 1", "a list of one or more", "None"),
]
Ranks = Annotated[
    Literal["all"] | Annotated[tuple[Natural, ...], MinLen(1)],
    ListAsTuple,
    Accepts('"all"', "a list of one or more integers >= 0"),
]


class Profile(Section):
    """Steps that are traced and timed action by action. What is learned stays the same, bit for bit.

    >>> Profile(steps=[3, 4], ranks=[0, 2]).asks_for(step=4, rank=2)
    True
    """

    shorthand: ClassVar[str | None] = "steps"

    steps: Steps = Field(
        default=None,
        description="Optimizer steps to profile, counted from 1 as in the history. None: none.",
    )
    ranks: Ranks = Field(default="all", description="Ranks that leave a trace.")

    @rule("steps")
    def each_step_once(self) -> Iterator[Problem]:
        """`steps` names no step twice."""
        if twice := _twice(self.steps or ()):
            yield Problem("steps", self.steps, f"has {twice} more than once; name each step once")

    @rule("ranks")
    def each_rank_once(self) -> Iterator[Problem]:
        """`ranks` names no rank twice."""
        if self.ranks != "all" and (twice := _twice(self.ranks)):
            yield Problem("ranks", self.ranks, f"has {twice} more than once; name each rank once")

    @rule("steps", "ranks")
    def ranks_need_steps(self) -> Iterator[Problem]:
        """`ranks` other than "all" asks for `steps`."""
        if self.steps is None and self.changed("ranks"):
            yield Problem("ranks", self.ranks, "has no effect without steps; name them too, or leave it out")

    def asks_for(self, *, step: int, rank: int) -> bool:
        """Whether `rank` is to profile `step`, counted from 1."""
        return step in (self.steps or ()) and (self.ranks == "all" or rank in self.ranks)


def _twice(numbers: Sequence[int]) -> str:
    return ", ".join(str(number) for number in sorted(set(numbers)) if numbers.count(number) > 1)
