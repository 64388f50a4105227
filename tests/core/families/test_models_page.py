"""The page of models says what there is, and what was found of it."""

from __future__ import annotations

from docs.make_models_table import FRAMEWORKS, LAYOUTS, PAGE, read_results, with_tables
from tests.cases import EVERY_HEAD
from tests.family_layouts import LAYOUTS as TESTED
from tests.family_results import AGAINST_TRANSFORMERS


def test_the_tables_are_those_of_the_families_and_of_the_results() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert with_tables(page) == page, "run: python docs/make_models_table.py"


def test_every_head_was_found_right_in_every_layout_that_is_tested() -> None:
    assert set(LAYOUTS) == {AGAINST_TRANSFORMERS, *TESTED}
    whole = {head: dict.fromkeys(LAYOUTS, "passed") for head in EVERY_HEAD}
    assert read_results() == dict.fromkeys(FRAMEWORKS, whole), "run: nox -s families"
