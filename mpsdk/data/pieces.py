"""Documents in pieces of bounded size, so that the longest document takes no more memory than any other."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

PIECE = 1 << 16
"""Characters (or token ids) of the longest piece. A constant: where a document is cut must not depend on the machine."""

_LINE_END = re.compile(r"\n(?=\S)")
_BEFORE_WORD = re.compile(r"(?<=\S)(?= \S)")


@dataclass(frozen=True)
class Piece:
    """Part of a document: text still to be tokenised, or token ids."""

    content: str | NDArray[Any]
    ends_document: bool


def cut(texts: Iterable[str]) -> Iterator[Piece]:
    """One document, given in any portions, as pieces of at most PIECE characters.

    A piece ends at the last line end that a non-space follows, else before the last word, else anywhere. Tokenizers
    that split text at white space before anything else (GPT-2's, Llama 3's) give the same ids as for the whole.
    """
    rest = ""
    for text in texts:
        rest += text
        start = 0
        while len(rest) - start > PIECE:
            end = _last_cut(rest, start, start + PIECE)
            yield Piece(rest[start:end], ends_document=False)
            start = end
        rest = rest[start:]
    if rest:
        yield Piece(rest, ends_document=True)


def _last_cut(text: str, start: int, limit: int) -> int:
    for pattern in (_LINE_END, _BEFORE_WORD):
        # Over ever longer stretches backwards: in usual text the last match is close to the limit.
        for back in (1 << 10, 1 << 14, PIECE):
            ends = [match.end() for match in pattern.finditer(text, max(start, limit - back), limit + 1)]
            if ends and ends[-1] > start:
                return ends[-1]
    return limit
