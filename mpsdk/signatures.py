"""Whether a hook takes what the method that it translates takes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

from mpsdk.errors import Problem


def other_signature(
    field: str, hook: Callable[..., Any] | None, method: Callable[..., Any]
) -> Iterator[Problem]:
    """A problem if `hook` takes other arguments than `method`, self left out. `*args, **kwargs` takes any."""
    if hook is None:
        return
    signature = inspect.signature(method)
    wanted = [
        one.replace(annotation=inspect.Parameter.empty) for one in list(signature.parameters.values())[1:]
    ]
    found = list(inspect.signature(hook).parameters.values())
    if {one.kind for one in found} == {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}:
        return
    alike = [(one.name, one.kind, one.default) for one in found]
    if alike != [(one.name, one.kind, one.default) for one in wanted]:
        takes = inspect.Signature(wanted)
        name = getattr(method, "__qualname__", repr(method))
        yield Problem(field, str(inspect.signature(hook)), f"must take {takes}, as {name} does")
