"""Keeps what the tests of families found, for the table of docs/models.md: `pytest -p tests.family_results`.

A result has a framework, a family with its head, and what was compared: a layout with one process, or one process with
transformers' own class. Results of an earlier run that this one does not repeat stay.
"""

from __future__ import annotations

import json

import pytest

from docs.make_models_table import RESULTS, read_results

AGAINST_TRANSFORMERS = "transformers"
FRAMEWORKS = {"torch": "torch", "tf": "tensorflow", "parity": "tensorflow"}
_PROPERTY = "family result"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        parameters = getattr(getattr(item, "callspec", None), "params", {})
        if item.path.stem == "test_families" and "name" in parameters:
            layout = parameters.get("layout", AGAINST_TRANSFORMERS)
            place = [FRAMEWORKS[item.path.parent.name], parameters["name"], layout]
            item.user_properties.append((_PROPERTY, place))


_found: dict[tuple[str, str, str], str] = {}


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" or not report.passed:
        for name, place in report.user_properties:
            if name == _PROPERTY:
                framework, head, layout = map(str, place)  # type: ignore[call-overload]
                key = (framework, head, layout)
                if _found.get(key) in (None, "passed"):  # of several tests, the one that failed counts
                    _found[key] = report.outcome


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workerinput"):  # one of several processes; the one that starts them writes
        return
    results = read_results()
    for (framework, head, layout), outcome in _found.items():
        results.setdefault(framework, {}).setdefault(head, {})[layout] = outcome
    RESULTS.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n", encoding="utf-8")
