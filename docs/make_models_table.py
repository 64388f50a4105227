"""Writes the table of docs/models.md from what the tests run through: python docs/make_models_table.py"""

from __future__ import annotations

from pathlib import Path

from mpsdk.families import FAMILIES

PAGE = Path(__file__).parent / "models.md"
BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"
OBJECTIVES = ("causal-lm", "masked-lm", "sequence-classification", "token-classification")


def table() -> str:
    """A row for each family: what transformers calls the class of each of its heads."""
    lines = [
        f"| `model_type` | {' | '.join(OBJECTIVES)} |",
        f"|---|{'---|' * len(OBJECTIVES)}",
    ]
    for family in FAMILIES.values():
        heads = {head.form.objective: f"`{head.architecture}`" for head in family.heads}
        lines.append(f"| `{family.model_type}` | {' | '.join(heads.get(name, '') for name in OBJECTIVES)} |")
    return "\n".join(lines)


def with_table(page: str) -> str:
    before, rest = page.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n\n{table()}\n\n{END}{after}"


def main() -> None:
    PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
