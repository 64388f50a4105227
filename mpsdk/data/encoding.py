"""Texts to rows of tokens as a model was trained to read them: special tokens in their places, cut to a length."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:
    import tokenizers


@dataclass(frozen=True)
class Specials:
    """The tokens of a tokenizer that are no text, and at which end it cuts rows and fills them up."""

    pad: int
    mask: int | None = None  # stands for a token to predict
    ids: tuple[int, ...] = ()  # all of them, ascending
    prefix: tuple[int, ...] = ()  # before a text
    suffix: tuple[int, ...] = ()  # behind it
    pads_left: bool = False
    cuts_left: bool = False


class Encoded(NamedTuple):
    """One row: ids, which text each is of (0 or 1), and of words which one; -1 of a token that is of none."""

    ids: list[int]
    types: list[int]
    words: list[int]
    cut: bool  # it was longer


class RowEncoder(Protocol):
    """Rows of at most a certain length, not filled up."""

    def shortest(self, texts: int) -> int:
        """The length below which not even one token of each of so many texts has room."""
        ...

    def texts(self, rows: Sequence[tuple[str, ...]]) -> list[Encoded]:
        """Rows of one text or of two. Of two, the longer is cut first, until both are equally long."""
        ...

    def words(self, rows: Sequence[Sequence[str]]) -> list[Encoded]:
        """Rows of words, read as if a space stood between them."""
        ...


class BytesRows:
    """Bytes, and an end behind each text.

    >>> BytesRows(8, end=256).texts([("ab", "c"), ("abcdefgh", "ij")])[1].ids
    [97, 98, 99, 100, 256, 105, 106, 256]
    """

    def __init__(self, length: int, *, end: int) -> None:
        self._length, self._end = length, end

    def shortest(self, texts: int) -> int:
        return 2 * texts

    def texts(self, rows: Sequence[tuple[str, ...]]) -> list[Encoded]:
        return [self._row([text.encode() for text in row]) for row in rows]

    def _row(self, texts: list[bytes]) -> Encoded:
        ids: list[int] = []
        types: list[int] = []
        sizes = fitting([len(text) for text in texts], self._length - len(texts))
        for number, (text, size) in enumerate(zip(texts, sizes, strict=True)):
            ids += [*text[:size], self._end]
            types += [number] * (size + 1)
        return Encoded(ids, types, [-1] * len(ids), cut=sum(sizes) < sum(map(len, texts)))

    def words(self, rows: Sequence[Sequence[str]]) -> list[Encoded]:
        return [self._words(row) for row in rows]

    def _words(self, row: Sequence[str]) -> Encoded:
        ids: list[int] = []
        words: list[int] = []
        for number, word in enumerate(row):
            space = b" " if number else b""  # of no word: a word's label stands at its own first byte
            ids += [*space, *word.encode()]
            words += [*(-1 for _ in space), *(number for _ in word.encode())]
        room = self._length - 1
        kept = [*ids[:room], self._end]
        return Encoded(kept, [0] * len(kept), [*words[:room], -1], cut=len(ids) > room)


def fitting(sizes: Sequence[int], room: int) -> list[int]:
    """What is left of one or two sizes for their sum to be at most `room`, taking from the larger one first.

    >>> fitting([7, 3], 8), fitting([7, 6], 9), fitting([7], 4)
    ([5, 3], [5, 4], [4])
    """
    if len(sizes) == 1:
        return [min(sizes[0], room)]
    first, second = sizes
    shorter, longer = sorted(sizes)
    if first + second > room:
        # Of two halves the larger stays with the longer text, or the second of two equal ones, as in `tokenizers`.
        shorter = min(shorter, room // 2)
        longer = room - shorter
    return [longer, shorter] if first > second else [shorter, longer]


class HuggingFaceRows:
    """What the post-processor of a tokenizer of the `tokenizers` library makes of one text or two."""

    def __init__(self, backend: tokenizers.Tokenizer, length: int, *, cuts_left: bool) -> None:
        self._length = length
        self._backend: Any = type(backend).from_str(backend.to_str())  # a setting of its own: the truncation
        self._direction = "left" if cuts_left else "right"
        # Byte-level tokenizers have the space in the token of the word behind it, and add none between words given singly.
        self._space = "" if "ByteLevel" not in _kinds(json.loads(backend.to_str())["pre_tokenizer"]) else " "

    def shortest(self, texts: int) -> int:
        return self._backend.num_special_tokens_to_add(texts == 2) + texts

    def texts(self, rows: Sequence[tuple[str, ...]]) -> list[Encoded]:
        return self._encoded([row if len(row) == 2 else row[0] for row in rows], words=False)

    def words(self, rows: Sequence[Sequence[str]]) -> list[Encoded]:
        spaced = [[word if word[:1].isspace() else self._space + word for word in row] for row in rows]
        return self._encoded(spaced, words=True)

    def _encoded(self, rows: Sequence[object], *, words: bool) -> list[Encoded]:
        self._backend.enable_truncation(self._length, strategy="longest_first", direction=self._direction)
        return [
            Encoded(
                found.ids,
                found.type_ids,
                [-1 if word is None else word for word in found.word_ids] if words else [-1] * len(found.ids),
                cut=bool(found.overflowing),
            )
            for found in self._backend.encode_batch(rows, is_pretokenized=words)
        ]


def _kinds(description: Any) -> set[str]:
    """The `type` of a part of a tokenizer.json and of the parts in it."""
    if isinstance(description, list):
        return {kind for part in description for kind in _kinds(part)}  # pyright: ignore[reportUnknownVariableType]
    if not isinstance(description, dict):
        return set()
    own: set[str] = {str(description.get("type"))}  # pyright: ignore
    return own.union(*(_kinds(part) for part in description.values()))  # pyright: ignore
