"""What a Training takes, which combinations it refuses, and the learning rate of every step."""

from __future__ import annotations

import doctest
from typing import Any

import pytest

from mpsdk.config import Training, distribution, training
from tests.core.config.messages import texts


@pytest.mark.parametrize("module", [distribution, training])
def test_the_examples_in_the_docstrings_are_true(module: Any) -> None:
    outcome = doctest.testmod(module)
    assert outcome.attempted > 0
    assert outcome.failed == 0


def test_defaults_are_those_of_the_published_optimizer() -> None:
    t = Training()
    assert (t.optimizer, t.betas, t.epsilon, t.momentum) == ("adamw", (0.9, 0.999), 1e-8, 0.0)
    assert (t.objective, t.learning_rate_schedule, t.max_grad_norm, t.dropout) == (
        "causal-lm",
        "cosine",
        1.0,
        None,
    )


def test_integers_do_for_numbers() -> None:
    t = Training(learning_rate=1, weight_decay=0, betas=(0, 0.5))
    assert (t.learning_rate, t.weight_decay, t.betas) == (1.0, 0.0, (0.0, 0.5))
    assert isinstance(t.learning_rate, float)


@pytest.mark.parametrize(
    ("given", "field", "remedy"),
    [
        ({"learning_rate": "3e-4"}, "learning_rate", "must be a number >= 0; write it without quotes"),
        ({"learning_rate": True}, "learning_rate", "must be a number >= 0"),
        ({"learning_rate": 10**400}, "learning_rate", "must be a number >= 0"),
        ({"betas": [0.9]}, "betas", "must be a list of 2, each a number >= 0 and < 1"),
        ({"betas": [0.9, 1]}, "betas", "must be a list of 2, each a number >= 0 and < 1"),
        ({"optimizer": "adam"}, "optimizer", 'must be "adamw" or "sgd"; did you mean "adamw"?'),
        ({"max_grad_norm": 0}, "max_grad_norm", "must be a number > 0 or None"),
        ({"dropout": 1}, "dropout", "must be a number >= 0 and < 1 or None"),
        ({"seed": -1}, "seed", "must be an integer >= 0 and <= 9223372036854775807"),
        ({"tokenizer": 3}, "tokenizer", 'must be "auto", "bytes", or a path'),
        ({"global_batchsize": 4}, "global_batchsize", "unknown key; did you mean global_batch?"),
        (
            {"global_batch": 10, "accumulation": 4},
            "global_batch",
            "must be divisible by accumulation, which is 4; set 8 or 12",
        ),
        (
            {"global_batch": 2, "accumulation": 4},
            "global_batch",
            "must be divisible by accumulation, which is 4; set 4",
        ),
        ({"steps": 5, "warmup_steps": 6}, "warmup_steps", "must be at most steps, which is 5"),
        (
            {"learning_rate": 0.1, "minimum_learning_rate": 0.2},
            "minimum_learning_rate",
            "must be at most learning_rate, which is 0.1",
        ),
        (
            {"learning_rate_schedule": "constant", "minimum_learning_rate": 1e-5},
            "minimum_learning_rate",
            'has no effect with schedule "constant"; leave it out, or choose "linear" or "cosine"',
        ),
        (
            {"momentum": 0.9},
            "momentum",
            'has no effect with "adamw"; leave it out, or set optimizer to "sgd"',
        ),
        (
            {"pair_column": "b"},
            "pair_column",
            'has no effect with objective "causal-lm"; leave it out',
        ),
        (
            {"objective": "masked-lm", "label_column": "y"},
            "label_column",
            'has no effect with objective "masked-lm"; leave it out',
        ),
        (
            {"objective": "token-classification", "mask_probability": 0.2},
            "mask_probability",
            'has no effect with objective "token-classification"; leave it out',
        ),
        (
            {"objective": "sequence-classification", "pair_column": "text"},
            "pair_column",
            "must be another column than text_column",
        ),
        (
            {"objective": "token-classification", "text_column": "label"},
            "label_column",
            "must be another column than those of the texts",
        ),
        (
            {"objective": "masked-lm", "mask_probability": 1},
            "mask_probability",
            "must be a number > 0 and < 1",
        ),
        (
            {"labels": ["a", "b"]},
            "labels",
            'has no effect with objective "causal-lm"; leave it out',
        ),
        (
            {"objective": "sequence-classification", "labels": ["a", "a"]},
            "labels",
            "must name at least two classes, each once",
        ),
        (
            {"optimizer": "sgd", "epsilon": 1e-6},
            "epsilon",
            'has no effect with "sgd"; leave it out, or set optimizer to "adamw"',
        ),
    ],
)
def test_a_wrong_value_or_broken_rule_is_told_with_what_would_do(
    given: dict[str, Any], field: str, remedy: str
) -> None:
    assert texts(Training, given) == {field: remedy}


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.25, 0.5, 0.75, 1.0, 0.775, 0.55, 0.325, 0.1]),
        # 0.1 + 0.9 (1 + cos(π k/4)) / 2 for k = 1 ... 4
        ("cosine", [0.25, 0.5, 0.75, 1.0, 0.8681980515, 0.55, 0.2318019485, 0.1]),
    ],
)
def test_learning_rate_of_every_step(schedule: Any, expected: list[float]) -> None:
    minimum = 0.0 if schedule == "constant" else 0.1
    t = Training(
        steps=8,
        warmup_steps=4,
        learning_rate=1.0,
        minimum_learning_rate=minimum,
        learning_rate_schedule=schedule,
    )
    assert [t.learning_rate_at(step) for step in range(8)] == pytest.approx(expected)


def test_learning_rate_without_warmup_starts_full_and_ends_at_the_minimum() -> None:
    t = Training(steps=5, learning_rate=2.0, learning_rate_schedule="linear")
    assert [t.learning_rate_at(step) for step in range(5)] == pytest.approx([2.0, 1.5, 1.0, 0.5, 0.0])
    assert Training(steps=1, learning_rate=2.0).learning_rate_at(0) == 2.0
