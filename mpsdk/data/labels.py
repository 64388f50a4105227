"""A classifier's labels: from what stands in the data to the numbers of classes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

from mpsdk.data import faults as fault
from mpsdk.data.faults import Fault

LISTED_NAMES = 20
SHOWN = 40  # characters of a label that a message shows


@dataclass(frozen=True)
class Labels:
    """So many classes, numbered from 0, and their names in that order, if they have any.

    >>> labels = Labels(2, ("no", "yes"))
    >>> labels.number("yes"), labels.number(1), labels.number("1")
    (1, 1, 1)
    """

    count: int
    names: tuple[str, ...] = ()

    def number(self, value: object) -> int | Fault:
        """The number of the class that `value` says: a name, else a number, which may be text, as in CSV.

        Anything else is a Fault: no label, one that is not known, a number that no class has.
        """
        if isinstance(value, str) and value in self.names:
            return self.names.index(value)
        if value is None or value == "" or (isinstance(value, float) and math.isnan(value)):
            return fault.NO_LABEL
        number = _integer(value)
        if number is None:
            return self._unknown(value)
        return number if 0 <= number < self.count else self._outside(number)

    def _unknown(self, value: object) -> Fault:
        shown = repr(value)[:SHOWN]
        if not self.names:
            return Fault(f"the label {shown} is no number", "name the classes, in order, in training.labels")
        listed = ", ".join(self.names[:LISTED_NAMES])
        more = f" and {len(self.names) - LISTED_NAMES} more" if len(self.names) > LISTED_NAMES else ""
        return Fault(
            f"the label {shown} is unknown, the labels are {listed}{more}",
            "correct it, or name all classes, in order, in training.labels",
        )

    def _outside(self, number: int) -> Fault:
        return Fault(
            f"the label {number} is none of the {self.count} classes 0 to {self.count - 1}",
            "correct it, or name all classes, in order, in training.labels",
        )


def _integer(value: object) -> int | None:
    if isinstance(value, str):
        digits = value.strip().removeprefix("-")
        return int(value) if digits.isascii() and digits.isdigit() else None
    if isinstance(value, (int, float)):
        return int(value) if float(value).is_integer() else None
    return None


def names_in(hf_config: Mapping[str, object]) -> tuple[str, ...]:
    """The names that a Hugging Face configuration gives its classes; none unless there is one for each number."""
    named = hf_config.get("id2label")
    if not isinstance(named, Mapping):
        return ()
    names = {str(number): str(name) for number, name in cast("Mapping[object, object]", named).items()}
    wanted: Sequence[str] = [str(number) for number in range(len(names))]
    return tuple(names[number] for number in wanted) if set(wanted) == set(names) else ()
