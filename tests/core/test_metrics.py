"""Metrics of an evaluation: by hand, by counting labels one by one, and by scikit-learn's definitions."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpsdk.backend import Evaluation
from mpsdk.metrics import measured, validation_row


def of(*rows: list[int]) -> dict[str, float]:
    return measured(Evaluation(0.0, 1.0, np.array(rows)))


def test_a_language_model_has_a_perplexity() -> None:
    assert measured(Evaluation(30.0, 10.0)) == {"loss": 3.0, "tokens": 10, "perplexity": math.exp(3.0)}
    assert measured(Evaluation(1e9, 1.0))["perplexity"] == math.inf
    assert measured(Evaluation(0.0, 0.0)) == {"loss": 0.0, "tokens": 0, "perplexity": 1.0}


def test_of_two_classes_f1_is_that_of_class_1() -> None:
    # True 1: 3, of which 2 are found; taken for 1: 4.
    found = of([5, 2], [1, 2])
    assert found["accuracy"] == 0.7
    assert found["f1"] == pytest.approx(2 * (2 / 4) * (2 / 3) / (2 / 4 + 2 / 3))
    assert found["f1_macro"] == pytest.approx((found["f1"] + 2 * 5 / (7 + 6)) / 2)


def test_of_more_classes_there_is_no_f1_of_one_and_a_class_that_never_occurs_is_left_out() -> None:
    found = of([2, 0, 0], [0, 2, 0], [0, 0, 0])
    assert {"accuracy": 1.0, "f1_macro": 1.0}.items() <= found.items()
    assert "f1" not in found


def test_a_class_never_taken_for_and_a_class_never_true_count_as_0() -> None:
    assert of([0, 2, 0], [0, 2, 0], [0, 0, 0])["f1_macro"] == pytest.approx((0 + 2 / 3) / 2)
    assert of([0, 0], [3, 0]) == {"loss": 0.0, "labels": 1, "accuracy": 0.0, "f1_macro": 0.0, "f1": 0.0}


def test_nothing_evaluated_is_no_division_by_zero() -> None:
    assert of([0, 0], [0, 0]) == {"loss": 0.0, "labels": 1, "accuracy": 0.0, "f1_macro": 0.0, "f1": 0.0}


@given(st.integers(2, 5).flatmap(lambda n: st.lists(st.tuples(*[st.integers(0, n - 1)] * 2), min_size=1)))
def test_the_confusion_matrix_says_what_the_labels_one_by_one_do(pairs: list[tuple[int, int]]) -> None:
    classes = 1 + max(1, *(max(pair) for pair in pairs))
    confusion = np.zeros((classes, classes), dtype=np.int64)
    for true, taken in pairs:
        confusion[true, taken] += 1
    found = measured(Evaluation(0.0, len(pairs), confusion))
    scores = []
    for one in {number for pair in pairs for number in pair}:
        right = sum(pair == (one, one) for pair in pairs)
        precision = right / max(1, sum(taken == one for _, taken in pairs))
        recall = right / max(1, sum(true == one for true, _ in pairs))
        scores.append(2 * precision * recall / (precision + recall) if right else 0.0)
    assert found["f1_macro"] == pytest.approx(sum(scores) / len(scores))
    assert found["accuracy"] == pytest.approx(sum(a == b for a, b in pairs) / len(pairs))


def test_batches_join_into_one_evaluation() -> None:
    total = Evaluation(0.0, 0.0)
    for loss, count in product((1.0, 2.0), (1, 3)):
        total = total.joined(Evaluation(loss, count, np.full((2, 2), count)))
    assert (total.loss, total.count) == (6.0, 8.0)
    assert total.confusion is not None and total.confusion.tolist() == [[8, 8], [8, 8]]
    assert Evaluation(1.0, 2.0).joined(Evaluation(2.0, 3.0)) == Evaluation(3.0, 5.0, None)


def test_the_history_has_what_measures_the_model() -> None:
    row = validation_row({"loss": 1.0, "labels": 3, "accuracy": 0.5})
    assert row == {"validation_loss": 1.0, "validation_accuracy": 0.5}
