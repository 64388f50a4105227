"""Keras' own `fit`, on one process: over Keras' layers, and over mpsdk's as an ordinary Keras model."""

from __future__ import annotations

import threading
import traceback
from collections.abc import Iterator
from queue import SimpleQueue
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from benchmarks.contenders import Seat
from benchmarks.contenders.gpt2_keras import adamw, cross_entropy, gpt2
from mpsdk_tf.pretrained import from_pretrained


class Fit:
    """One long `fit` in a thread, which waits before each of its steps until that step is asked for.

    So a turn is what happens inside `fit`, and not what it does once at its beginning. Option `compile`: the whole step by XLA.
    """

    def __init__(self, seat: Seat, model: Any) -> None:
        self.seat, self.turns = seat, _Turns()
        self.under_way, self.last = 0, 0.0
        model.compile(adamw(model), cross_entropy(), jit_compile=bool(seat.options.get("compile")))
        threading.Thread(target=self._fit, args=(model,), daemon=True).start()

    def step(self, step: int) -> None:
        self.under_way += 1
        self.turns.asked.release()

    def loss(self) -> float:
        for _ in range(self.under_way):
            loss = self.turns.losses.get()
            if isinstance(loss, str):
                raise RuntimeError(f"fit ended\n{loss}")
            self.last = loss
        self.under_way = 0
        return self.last

    def _fit(self, model: Any) -> None:
        try:
            model.fit(self._data(), callbacks=[self.turns], shuffle=False, verbose=0)
            self.turns.losses.put("its data are at an end")
        except Exception:
            self.turns.losses.put(traceback.format_exc())

    def _data(self) -> tf.data.Dataset:
        size = self.seat.size
        rows = tf.TensorSpec((size.batch, size.length), tf.int32)
        return tf.data.Dataset.from_generator(self._rows, output_signature=(rows, rows))

    def _rows(self) -> Iterator[tuple[Any, ...]]:
        step = 0
        while True:
            yield tuple(rows.astype(np.int32) for rows in self.seat.size.rows(step))
            step += 1


class _Turns(keras.callbacks.Callback):
    """Holds `fit` until a step is asked for, and passes on the step's own loss, where Keras keeps a mean."""

    def __init__(self) -> None:
        super().__init__()
        self.asked = threading.Semaphore(0)
        self.losses: SimpleQueue[float | str] = SimpleQueue()

    def on_train_batch_begin(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        self.asked.acquire()
        assert self.model is not None
        self.model.reset_metrics()

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        assert logs is not None
        self.losses.put(float(logs["loss"]))


def keras_layers(seat: Seat) -> Fit:
    return Fit(seat, gpt2(seat))


def our_layers(seat: Seat) -> Fit:
    return Fit(seat, from_pretrained(seat.model))
