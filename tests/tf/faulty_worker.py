"""A worker with a planted fault: `python -m tests.tf.faulty_worker FAULT RANK STEP JOB`."""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import Any

from mpsdk.worker import main
from mpsdk_tf.step import Trainer

fault, rank, when = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
train = Trainer.step


def faulty(self: Trainer, batch: Any, *, step: int, learning_rate: float) -> Any:
    if self.place.rank == rank and step == when:
        if fault == "raise":
            raise ArithmeticError("planted: the rank's own message")
        if fault == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if fault == "hang":
            self.place.note(f"step {step}: a planted wait")
            time.sleep(3600)
        if fault == "ragged":  # the last rows of a corpus, too few for a microbatch
            batch = {name: rows[:, :, :-1] for name, rows in batch.items()}
        if fault == "long":  # a sequence longer than the other ranks'
            batch = {name: rows.repeat(2, axis=-1) for name, rows in batch.items()}
    return train(self, batch, step=step, learning_rate=learning_rate)


if __name__ == "__main__":
    Trainer.step = faulty
    sys.argv[1:4] = []
    main()
