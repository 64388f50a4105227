"""What an evaluation says of a model: loss and perplexity, or how often and how evenly a classifier is right.

The names are those of scikit-learn's scorers. With T true labels of a class, P taken for it, and C both at once, its F1 is
2 C / (T + P), the harmonic mean of precision C / P and recall C / T, and 0 where C is. `f1_macro` is the mean over the classes
that occur, among the labels or among what was taken for them; `f1`, with two classes alone, is that of class 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from mpsdk.backend import Evaluation

COUNTS = ("tokens", "labels")  # what a loss is the mean of; no measure of the model


def measured(evaluation: Evaluation) -> dict[str, float]:
    """The `loss`, in nats: the mean over the labels. Of a language model `tokens`, how many these are, and `perplexity`, the
    loss's exponential; of a classifier `labels`, `accuracy`, `f1_macro` and, with two classes, `f1`.

    >>> measured(Evaluation(1.5, 3, np.array([[1, 0], [1, 1]])))
    {'loss': 0.5, 'labels': 3, 'accuracy': 0.6666666666666666, 'f1_macro': 0.6666666666666666, 'f1': 0.6666666666666666}
    """
    loss, count = evaluation.loss / max(evaluation.count, 1.0), int(evaluation.count)
    if evaluation.confusion is None:
        return {"loss": loss, "tokens": count, "perplexity": _exponential(loss)}
    return {"loss": loss, "labels": count, **_of_classes(evaluation.confusion)}


def validation_row(measures: Mapping[str, float]) -> dict[str, float]:
    """What of `measures` stands in the history, and how it is named there."""
    return {f"validation_{name}": value for name, value in measures.items() if name not in COUNTS}


def _of_classes(confusion: NDArray[np.int64]) -> dict[str, float]:
    """`confusion`: of the labels of each class (row), how many were taken for each class (column)."""
    right = np.diagonal(confusion)
    both = confusion.sum(axis=0) + confusion.sum(axis=1)  # of each class: its labels, and those taken for it
    f1 = 2 * right / np.maximum(both, 1)
    occurs = both > 0
    measures = {
        "accuracy": float(right.sum() / max(confusion.sum(), 1)),
        "f1_macro": float(f1[occurs].mean()) if occurs.any() else 0.0,
    }
    return measures | ({"f1": float(f1[1])} if len(confusion) == 2 else {})


def _exponential(loss: float) -> float:
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf
