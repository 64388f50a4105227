"""Facts about every configuration: what is valid survives a round trip, what is not gives one ConfigError."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from pydantic import ValidationError

from mpsdk.config import Document, Training, problems_of
from mpsdk.errors import ConfigError
from tests.core.config.strategies import FUZZED, VALID

SCHEMAS = {document: Draft202012Validator(document.json_schema()) for document in VALID}
quick = settings(deadline=None, max_examples=60)
each_document = pytest.mark.parametrize("document", VALID, ids=lambda document: document.__name__)


@each_document
@quick
@given(data=st.data())
def test_what_is_valid_survives_the_round_trip_through_plain_data_and_json(
    document: type[Document], data: st.DataObject
) -> None:
    parsed = document.parse(data.draw(VALID[document]))
    assert document.parse(parsed) == parsed
    assert document.parse(parsed.to_dict()) == parsed
    assert document.parse(json.loads(json.dumps(parsed.to_dict(), allow_nan=False))) == parsed
    assert document.model_validate_json(parsed.model_dump_json()) == parsed


@each_document
@settings(quick, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=20)
@given(data=st.data())
def test_what_is_valid_survives_the_round_trip_through_files(
    document: type[Document], data: st.DataObject, tmp_path: Path
) -> None:
    parsed = document.parse(data.draw(VALID[document]))
    for name, text in (
        ("d.json", json.dumps(parsed.to_dict())),
        ("d.yaml", yaml.safe_dump(parsed.to_dict())),
    ):
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        assert document.from_file(path) == parsed


@each_document
@quick
@given(data=st.data())
def test_the_schema_takes_every_valid_configuration(document: type[Document], data: st.DataObject) -> None:
    given_as = data.draw(VALID[document])
    parsed = document.parse(given_as)
    for form in (given_as, parsed.to_dict()):
        assert list(SCHEMAS[document].iter_errors(form)) == []


@each_document
@settings(quick, max_examples=200)
@given(data=st.data())
def test_anything_json_like_gives_a_document_or_one_config_error(
    document: type[Document], data: st.DataObject
) -> None:
    source: Any = data.draw(FUZZED[document])
    try:
        parsed = document.parse(source)
    except ConfigError as error:
        assert error.problems
        assert all(problem.field and problem.remedy for problem in error.problems)
        with pytest.raises(ValidationError) as twin:
            document.model_validate(source)
        assert (
            str(ConfigError(problems_of(twin.value, root=document.root()))).partition("\n")[2]
            == str(error).partition("\n")[2]
        )
    else:
        assert document.parse(parsed.to_dict()) == parsed
        assert SCHEMAS[document].is_valid(source)


@quick
@given(st.integers(1, 300), st.data())
def test_learning_rate_rises_over_the_warmup_and_falls_to_its_minimum(
    steps: int, data: st.DataObject
) -> None:
    warmup = data.draw(st.integers(0, steps))
    schedule = data.draw(st.sampled_from(["linear", "cosine"]))
    training = Training(
        steps=steps,
        warmup_steps=warmup,
        learning_rate_schedule=schedule,
        learning_rate=1.0,
        minimum_learning_rate=0.1,
    )
    rates = [training.learning_rate_at(step) for step in range(steps)]
    peak = max(warmup - 1, 0)
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert max(rates) == rates[peak] == 1.0
    assert math.isclose(rates[-1], 1.0 if peak == steps - 1 else 0.1)
    assert math.isclose(training.learning_rate_at(steps + 5), 0.1)
