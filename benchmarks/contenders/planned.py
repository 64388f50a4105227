"""mpsdk under a plan, on either framework: `ours` and `ours_tf` name the backend."""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks.contenders import Seat
from benchmarks.sizes import LEARNING_RATE, MAX_GRAD_NORM, WEIGHT_DECAY
from mpsdk.backend import Backend, Place, StepResult
from mpsdk.config import Distribution, Training
from mpsdk.families import read_model
from mpsdk.families.describe import describe_spec
from mpsdk.families.hf import HuggingFaceSource
from mpsdk.families.read import ReadModel
from mpsdk.plan import Plan
from mpsdk.resolve import resolve


def plan_of(seat: Seat, framework: str) -> tuple[Plan, ReadModel]:
    """The plan that `seat`'s options ask for, and the model's directory as read."""
    read = read_model(seat.model)
    distribution: Any = seat.options["distribution"]
    training = Training(
        steps=1_000_000, global_batch=seat.size.batch, sequence_length=seat.size.length, learning_rate=LEARNING_RATE,
        learning_rate_schedule="constant", weight_decay=WEIGHT_DECAY, max_grad_norm=MAX_GRAD_NORM,
    )  # fmt: skip
    plan = resolve(
        Distribution.parse(distribution),
        describe_spec(read.spec),
        training,
        world_size=seat.world_size,
        framework=framework,
    )
    return plan, read


class Planned:
    def __init__(self, seat: Seat, backend: Backend, framework: str) -> None:
        self.plan, read = plan_of(seat, framework)
        assert read.directory is not None
        self.seat, self.data_rank = seat, self.plan.topology.data_rank(seat.rank)
        self.backend = backend
        backend.build(
            self.plan,
            Place(rank=seat.rank, world_size=seat.world_size, local_rank=seat.rank, store=seat.store),
        )
        backend.load(HuggingFaceSource(read.directory, read.family, read.spec))
        self.result: StepResult | None = None

    def step(self, step: int) -> None:
        plan = self.plan
        shape = (1, plan.microbatches, plan.microbatch_size, self.seat.size.length)
        mine = self.seat.share(self.data_rank, plan.data_size)
        ids, labels = (rows[mine].astype(np.int32).reshape(shape) for rows in self.seat.size.rows(step))
        batch = {"input_ids": ids, "labels": labels}
        self.result = self.backend.step(batch, step=step, learning_rate=LEARNING_RATE)

    def loss(self) -> float:
        assert self.result is not None
        return self.result.read()["loss"]
