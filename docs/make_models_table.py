"""Writes the tables of docs/models.md: python docs/make_models_table.py

One is of the families, the other of what `nox -s families` found when it was last run whole.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from mpsdk.families import FAMILIES

PAGE = Path(__file__).with_name("models.md")
RESULTS = Path(__file__).with_name("models_results.json")
OBJECTIVES = ("causal-lm", "masked-lm", "sequence-classification", "token-classification")
FRAMEWORKS = {"torch": "PyTorch", "tensorflow": "TensorFlow"}
LAYOUTS = {  # as tests/family_layouts.py has them, and how a column is headed
    "transformers": "as transformers", "tp2": "tp2", "tp2-no-sequence": "tp2, no sequence", "pp2": "pp2", "sdp2": "sdp2",
    "pp2-tp2": "pp2·tp2", "pp2-tp2-zb-h1-recomputed": "pp2·tp2, zb-h1, recomputed",
}  # fmt: skip
SIGNS = {"passed": "yes"}

Results = dict[str, dict[str, dict[str, str]]]


def read_results() -> Results:
    """By framework, family with head, and layout: "passed", or what else became of it."""
    return json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}


def families() -> str:
    """A row for each family: what transformers calls the class of each of its heads."""
    rows = []
    for family in FAMILIES.values():
        heads = {head.form.objective: f"`{head.architecture}`" for head in family.heads}
        rows.append([f"`{family.model_type}`", *(heads.get(name, "") for name in OBJECTIVES)])
    return _table(["`model_type`", *OBJECTIVES], rows)


def results() -> str:
    """A row for each head in each framework: in which layouts it was found right."""
    found = read_results()
    rows = [
        [
            f"`{family.model_type}`",
            head.form.objective,
            label,
            *(SIGNS.get(result := of_head.get(layout, ""), result) for layout in LAYOUTS),
        ]
        for family in FAMILIES.values()
        for head in family.heads
        for framework, label in FRAMEWORKS.items()
        for of_head in [found.get(framework, {}).get(f"{family.model_type}-{head.form.objective}", {})]
    ]
    return _table(["`model_type`", "head", "framework", *LAYOUTS.values()], rows)


def _table(heads: list[str], rows: Iterable[list[str]]) -> str:
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def with_tables(page: str) -> str:
    for name, text in {"families": families(), "results": results()}.items():
        begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
        before, rest = page.split(begin)
        _, after = rest.split(end)
        page = f"{before}{begin}\n\n{text}\n\n{end}{after}"
    return page


def main() -> None:
    PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
