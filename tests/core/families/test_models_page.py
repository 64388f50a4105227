"""The page of models says what there is."""

from __future__ import annotations

from docs.make_models_table import PAGE, with_table


def test_the_table_is_that_of_the_families() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert with_table(page) == page, "run: python docs/make_models_table.py"
