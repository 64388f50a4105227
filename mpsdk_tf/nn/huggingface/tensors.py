"""The operations on arrays that a translation is made of: numpy's own, and TensorFlow's for all others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from mpsdk.families.translate import NUMPY, Arrays


def _read(value: Any) -> Any:
    return value if isinstance(value, np.ndarray) else tf.convert_to_tensor(value)


def _join(arrays: Sequence[Any], axis: int) -> Any:
    if all(isinstance(array, np.ndarray) for array in arrays):
        return NUMPY.join(arrays, axis)
    return tf.concat(arrays, axis)


def _transpose(array: Any) -> Any:
    return NUMPY.transpose(array) if isinstance(array, np.ndarray) else tf.transpose(array)


def _equal(one: Any, other: Any) -> bool:
    return one is other or NUMPY.equal(np.asarray(one), np.asarray(other))


TENSORS: Arrays[Any] = Arrays(read=_read, join=_join, transpose=_transpose, equal=_equal)
