"""The word for a tensor in annotations.

A type checker is told nothing of it: TensorFlow's hints contradict what it does (every size of a shape may be None in them,
a gradient function's result is the pair that it is made from, a variable starts from tensors only).
"""

from __future__ import annotations

from typing import Any, TypeAlias

Tensor: TypeAlias = Any
"""A `tf.Tensor`."""
