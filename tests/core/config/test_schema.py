"""The JSON schema: what an editor must not flag, and what it should. `test_properties` has the first at random."""

from __future__ import annotations

from typing import Any

import pytest
from jsonschema import Draft202012Validator

from mpsdk.config import Distribution, Document, Job, Training

ALL = (Distribution, Training, Job)


def accepts(document: type[Document], config: Any) -> bool:
    return Draft202012Validator(document.json_schema()).is_valid(config)


@pytest.mark.parametrize("document", ALL)
def test_it_is_a_schema_and_describes_every_key(document: type[Document]) -> None:
    schema = document.json_schema()
    Draft202012Validator.check_schema(schema)
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert schema["description"] == document.summary()
    for name, field in document.model_fields.items():
        assert schema["properties"][name]["description"] == field.description


@pytest.mark.parametrize(
    ("document", "config"),
    [
        (Distribution, {}),
        (
            Distribution,
            {
                "sharded_data_parallel": 2,
                "tensor_parallel": 2,
                "pipeline": {"degree": 2, "partition": [5, 7], "microbatches": None},
                "data_parallel": "fill",
                "activation_checkpointing": "selective",
                "precision": "bf16",
                "compile": "auto",
                "checkpoint": {"every": 100, "keep": None},
                "placement": "pp,dp,sdp,cp,tp",
            },
        ),
        (Distribution, {"compile": True, "checkpoint": 100, "data_parallel": 4, "placement": None}),
        (Training, {"learning_rate": 1, "betas": [0, 0.5], "max_grad_norm": None}),
        (
            Job,
            {
                "model": "m",
                "distribution": "d.yaml",
                "training": "t.yaml",
                "data": "c.txt",
                "launcher": "local",
            },
        ),
        (Job, {"model": {"model_type": "gpt2", "n_layer": 2}, "distribution": {"pipeline": 2}}),
    ],
)
def test_valid_configurations_are_not_flagged(document: type[Document], config: dict[str, Any]) -> None:
    assert accepts(document, config)
    if not any(isinstance(value, str) and value.endswith(".yaml") for value in config.values()):
        document.parse(config)


@pytest.mark.parametrize(
    ("document", "config"),
    [
        (Distribution, {"pipline": 2}),
        (Distribution, {"pipeline": "2"}),
        (Distribution, {"pipeline": True}),
        (Distribution, {"pipeline": 0}),
        (Distribution, {"pipeline": {"degree": 2, "stages": 2}}),
        (Distribution, {"pipeline": {"schedule": "1f1B"}}),
        (Distribution, {"pipeline": {"partition": [0]}}),
        (Distribution, {"pipeline": {"memory_weight": 1.5}}),
        (Distribution, {"data_parallel": "full"}),
        (Distribution, {"precision": "fp64"}),
        (Distribution, {"compile": 1}),
        (Distribution, {"placement": "pp,dp,tp"}),
        (Distribution, {"placement": "pp,pp,dp,sdp,cp"}),
        (Training, {"learning_rate": "3e-4"}),
        (Training, {"betas": [0.9]}),
        (Training, {"dropout": 1}),
        (Job, {"model": 3}),
        (Job, {"model": "m", "distribution": {"pipeline": {"degree": -1}}}),
        (Job, {"model": "m", "launcher": {"timeout": 0}}),
    ],
)
def test_invalid_configurations_are_flagged(document: type[Document], config: dict[str, Any]) -> None:
    assert not accepts(document, config)


def test_a_path_stands_for_a_document_only_inside_another() -> None:
    assert not accepts(Distribution, "d.yaml")
    assert accepts(Job, {"distribution": "d.yaml"})
