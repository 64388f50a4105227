"""What is wrong with the data: gathered while they are read, raised once, with every bad place and what to do."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from mpsdk.errors import DataError

LISTED_RANGES = 100
"""Ranges of bad lines that a message lists of one file; how many more there are is said."""
LISTED_PROBLEMS = 100
"""Kinds of damage that a message lists; how many more bad places there are is said."""


@dataclass(frozen=True)
class Fault:
    """A kind of damage, and its remedy."""

    what: str
    remedy: str


NOT_UTF8 = Fault("not UTF-8 text", "save it as UTF-8, for example: iconv -f ISO-8859-1 -t UTF-8 OLD > NEW")
NOT_JSON = Fault("not valid JSON", "write one JSON object on each line")
NOT_OBJECT = Fault("not a JSON object", 'write one object on each line, such as {"text": "..."}')
NOT_CSV = Fault(
    "not valid CSV", "quote cells that have commas, quotes or line ends in them, and double the quotes"
)
NOT_PARQUET = Fault("not a Parquet file, or a damaged one", "write it again")
UNEVEN = Fault("not as many cells as the header names", "quote cells that have commas in them")
NO_TEXT = Fault("no text", "put it in, or leave the record out")
NOT_TEXT = Fault("the text is not a string", "make it a string, or leave the record out")
SURROGATE = Fault(
    "half of a surrogate pair", "write the whole character, or remove the escape \\uD800 to \\uDFFF"
)
EMPTY = Fault("empty", "remove it, or put the missing text in")
UNREADABLE = Fault("can't be read", "check that the file exists and its permissions")
NOT_TOKENS = Fault(
    "not a one-dimensional list of integer token ids", "give whole numbers, one list a document"
)
FOREIGN_REMEDY = "tokenise with the tokenizer that training.tokenizer names"
NO_TOKENS = Fault("the tokenizer makes no token of it", "leave the record out")
NOT_WORDS = Fault("the text is not a list of words", 'write one such as ["a", "word"]; in CSV as JSON')
NOT_LABELS = Fault(
    "the labels are not a list", "write as many as there are words, such as [0, 1]; in CSV as JSON"
)
UNEVEN_LABELS = Fault("not as many labels as words", "give each word its label")
NO_LABEL = Fault("no label", "put it in, or leave the record out")


def missing(columns: Iterable[str], there: Iterable[str]) -> Fault:
    """`columns` are not among those that are `there`."""
    wanted, found = (", ".join(map(repr, names)) for names in (columns, there))
    return Fault(
        f"no column {wanted}, but {found or 'none at all'}",
        "name the columns with training.text_column, pair_column and label_column, or rename them",
    )


class Faults:
    """A collector. Consecutive numbers are kept as ranges, so that a million bad lines stay a short message."""

    def __init__(self, source: str) -> None:
        self.source = source
        self._ranges: dict[tuple[str, str, Fault], list[tuple[int, int]]] = {}
        self._unlisted = 0

    def __bool__(self) -> bool:
        return bool(self._ranges)

    def add(self, place: str, fault: Fault, number: int | None = None, *, unit: str = "line") -> None:
        """Note `fault` at `place` (a file, say) and, if given, at its line (or other unit) `number`."""
        if len(self._ranges) == LISTED_PROBLEMS and (place, unit, fault) not in self._ranges:
            self._unlisted += 1
            return
        ranges = self._ranges.setdefault((place, unit, fault), [])
        if number is None:
            return
        if ranges and ranges[-1][1] + 1 == number:
            ranges[-1] = (ranges[-1][0], number)
        else:
            ranges.append((number, number))

    def raise_if_any(self) -> None:
        """Raises one DataError that lists everything noted; does nothing when nothing was."""
        if not self._ranges:
            return
        count = len(self._ranges)
        lines = [f"{count} problem{'s' if count != 1 else ''} in the data at {self.source}:"]
        for number, ((place, unit, fault), ranges) in enumerate(self._ranges.items(), start=1):
            lines.append(f"  {number}. {place}{_numbers(ranges, unit)}: {fault.what}; {fault.remedy}")
        if self._unlisted:
            lines.append(f"  and at {self._unlisted} more places something else")
        raise DataError("\n".join(lines))


def _numbers(ranges: list[tuple[int, int]], unit: str) -> str:
    if not ranges:
        return ""
    shown = [str(a) if a == b else f"{a}-{b}" for a, b in ranges[:LISTED_RANGES]]
    unlisted = sum(b - a + 1 for a, b in ranges[LISTED_RANGES:])
    plural = "" if len(ranges) == 1 and ranges[0][0] == ranges[0][1] else "s"
    return f", {unit}{plural} {', '.join(shown)}" + (f" and {unlisted} more" if unlisted else "")
