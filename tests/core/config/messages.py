"""What a refused configuration was told."""

from __future__ import annotations

from typing import Any

import pytest

from mpsdk.config import Document
from mpsdk.errors import ConfigError, Problem


def problems(document: type[Document], source: Any) -> tuple[Problem, ...]:
    """The problems for which `document` refuses `source`."""
    with pytest.raises(ConfigError) as caught:
        document.parse(source)
    return caught.value.problems


def texts(document: type[Document], source: Any) -> dict[str, str]:
    """The remedy for each field for which `document` refuses `source`."""
    found = problems(document, source)
    assert len({problem.field for problem in found}) == len(found), "a field is told twice"
    return {problem.field: problem.remedy for problem in found}
