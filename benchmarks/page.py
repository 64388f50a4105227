"""Tables of a documentation page, made from measured results: no number is typed by hand."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path


def fill(page: Path, tables: Mapping[str, Iterable[str]]) -> None:
    """Replace what stands between the marks of `page`, `<!-- table NAME -->` and `<!-- end -->`, by lines."""
    text = page.read_text(encoding="utf-8")
    for name, lines in tables.items():
        body = "\n".join(lines)
        mark = re.compile(rf"(<!-- table {name} -->\n).*?(\n<!-- end -->)", re.DOTALL)
        text, found = mark.subn(lambda match, body=body: f"{match[1]}\n{body}\n{match[2]}", text)
        if found != 1:
            raise ValueError(f"{page} must have one mark <!-- table {name} -->; it has {found}")
    page.write_text(text, encoding="utf-8")


def head(*names: str) -> tuple[str, str]:
    return row(*names), "|" + "|".join("---" for _ in names) + "|"


def row(*cells: object) -> str:
    return "| " + " | ".join(str(cell) for cell in cells) + " |"
