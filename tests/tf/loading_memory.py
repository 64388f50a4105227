"""Bytes that building and loading a model adds at most to one rank's own memory: `python -m tests.tf.loading_memory`."""

from __future__ import annotations

import sys

from mpsdk.backend import Place
from mpsdk_tf.backend import TensorFlowBackend
from tests.loading import SMALL, loading_plan, most_memory, open_source


def memory(place: Place, small: str, directory: str) -> int:
    """TensorFlow's server, and what it makes at the first use of each operation, are there before."""
    backend = TensorFlowBackend()
    try:
        backend.build(loading_plan("tensorflow", **SMALL), place)
        backend.load(open_source(small))
        with most_memory() as most:
            backend.build(loading_plan("tensorflow"), place)
            backend.load(open_source(directory))
        return most[0]
    finally:
        backend.close()


if __name__ == "__main__":
    rank, store, *directories = sys.argv[1:]
    print(memory(Place(int(rank), 4, int(rank), store=store), *directories))
