"""mpsdk: the TensorFlow backend under a plan."""

from __future__ import annotations

from benchmarks.contenders import Seat
from benchmarks.contenders.planned import Planned
from mpsdk_tf.backend import TensorFlowBackend


def plan(seat: Seat) -> Planned:
    return Planned(seat, TensorFlowBackend(), "tensorflow")
