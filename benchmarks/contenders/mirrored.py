"""A custom loop under `MultiWorkerMirroredStrategy`: Keras 3's `fit` fails there."""

from __future__ import annotations

import json
import os
import socket
import time
from pathlib import Path
from typing import Any

import tensorflow as tf

from benchmarks.contenders import Seat
from benchmarks.contenders.gpt2_keras import adamw, cross_entropy, gpt2

RENDEZVOUS_TIMEOUT = 60.0  # seconds


def join(seat: Seat) -> tf.distribute.Strategy:
    """The strategy, of which every process is a worker with one replica."""
    task = {"type": "worker", "index": seat.rank}
    os.environ["TF_CONFIG"] = json.dumps({"cluster": {"worker": _addresses(seat)}, "task": task})
    return tf.distribute.MultiWorkerMirroredStrategy()


def _addresses(seat: Seat) -> list[str]:
    """Every rank leaves a free port in a file of its own, and reads the others'."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    mine = Path(f"{seat.store}.{seat.rank}.new")
    mine.write_text(address)
    mine.rename(mine.with_suffix(""))
    files = [Path(f"{seat.store}.{rank}") for rank in range(seat.world_size)]
    give_up = time.monotonic() + RENDEZVOUS_TIMEOUT
    while not all(file.exists() for file in files):
        if time.monotonic() > give_up:
            raise RuntimeError(f"not every rank came within {RENDEZVOUS_TIMEOUT:.0f} s")
        time.sleep(0.05)
    return [file.read_text() for file in files]


class Mirrored:
    """Gradients are summed over the replicas (Keras has divided the loss by their number), clipped, and applied.

    Inside of a replica, Keras' optimizer would clip that replica's gradients and sum after that; so it is called outside
    of `strategy.run`, where it takes gradients as they are.

    Option `compile`: a replica's forward and backward by XLA, which can take neither collectives nor mirrored variables.
    """

    def __init__(self, seat: Seat) -> None:
        self.seat, self.strategy = seat, join(seat)
        with self.strategy.scope():
            self.model: Any = gpt2(seat)
            self.optimizer = adamw(self.model)
            self.optimizer.build(self.model.trainable_variables)
        self.cross_entropy: Any = cross_entropy()
        compiled = True if seat.options.get("compile") else None
        self._differentiate = tf.function(self._gradients, jit_compile=compiled)
        self._train = tf.function(self._step)
        self.last = tf.zeros(())

    def step(self, step: int) -> None:
        mine = self.seat.share(self.seat.rank, self.seat.world_size)
        ids, labels = (tf.constant(rows[mine], tf.int32) for rows in self.seat.size.rows(step))
        self.last = self._train(ids, labels)

    def loss(self) -> float:
        return float(self.last)

    def _step(self, ids: Any, labels: Any) -> Any:
        loss, gradients = self.strategy.run(self._replica, (ids, labels))
        self.optimizer.apply(gradients, self.model.trainable_variables)
        return loss

    def _replica(self, ids: Any, labels: Any) -> tuple[Any, list[Any]]:
        weights = [variable.value for variable in self.model.trainable_variables]
        loss, gradients = self._differentiate(
            [tf.convert_to_tensor(weight) for weight in weights], ids, labels
        )
        context = tf.distribute.get_replica_context()
        return context.all_reduce("SUM", loss), context.all_reduce("SUM", gradients)

    def _gradients(self, weights: list[Any], ids: Any, labels: Any) -> tuple[Any, list[Any]]:
        with tf.GradientTape() as tape:
            tape.watch(weights)
            logits, _ = self.model.stateless_call(weights, [], ids, training=True)
            loss = self.cross_entropy(labels, logits)
        return loss, [tf.convert_to_tensor(gradient) for gradient in tape.gradient(loss, weights)]


def loop(seat: Seat) -> Mirrored:
    return Mirrored(seat)
