"""A second backend, in numpy, to show that the core runs a whole training without knowing whose framework it is.

The model is a bigram one with depth: token embedding, each block's feed-forward network with its residual, the output
projection, or a classifier of tokens or of the mean of a row's tokens, padding left out; attention, norms, positions and the
rest of the described model are held and saved, and take no part. Gradients are real, the optimizer is AdamW. Ranks are data
parallel over `dp` and `sdp` and speak through files; an `sdp` rank holds everything and writes its share of the rows.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Generator
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from numpy.typing import NDArray

from mpsdk.backend import (
    IGNORED_LABEL,
    WEIGHT,
    Batch,
    Evaluation,
    Place,
    RankState,
    Shard,
    StepResult,
    TensorSource,
)
from mpsdk.config import Distribution, Training
from mpsdk.description import ModelDescription
from mpsdk.errors import ConfigError, Problem
from mpsdk.launch.control import Control
from mpsdk.plan import Plan
from mpsdk.profile import MeasuredSpan, RankSpans, machine, trace_path

Arrays = dict[str, NDArray[Any]]
ROOT = Path(__file__).resolve().parents[2]
SLOTS = ("exp_avg", "exp_avg_sq")


def limits(distribution: Distribution, training: Training, description: ModelDescription) -> list[Problem]:
    """What the fake can't do. An entry point of its own, as every backend has."""
    degrees = {
        "pipeline.degree": distribution.pipeline.degree,
        "tensor_parallel.degree": distribution.tensor_parallel.degree,
    }
    problems = [
        Problem(name, degree, "the fake backend has 1") for name, degree in degrees.items() if degree > 1
    ]
    if training.optimizer != "adamw":
        problems.append(Problem("training.optimizer", training.optimizer, "the fake backend has adamw"))
    return problems


class FakeBackend:
    """See `mpsdk.backend.Backend`. The class attributes let a test look on and interfere."""

    reads: ClassVar[list[int]] = []  # steps (done) whose results were read
    before_step: ClassVar[Callable[[int], None] | None] = None
    loss_of: ClassVar[Callable[[int, float], float]] = staticmethod(lambda step, loss: loss)

    def describe(self, model: object) -> ModelDescription:
        raise ConfigError([Problem("model", type(model).__name__, "the fake backend knows families only")])

    def build(self, plan: Plan, place: Place) -> None:
        self.plan, self.place = plan, place
        tensors = [tensor for tensor in plan.description.tensors() if tensor.tied_to is None]
        self.decays = {tensor.name: tensor.decay for tensor in tensors}
        self.state: dict[str, Arrays] = {
            slot: {tensor.name: np.zeros(tensor.shape, np.float32) for tensor in tensors}
            for slot in (WEIGHT, *SLOTS)
        }
        self.updates = 0
        self.peers: Control | None = None
        self.exchanges = 0
        if place.world_size > 1:
            assert place.store is not None
            self.peers = Control(
                Path(f"{place.store}-fake"), "g", place.rank, place.world_size, place.timeout, place.note
            )

    def load(self, source: TensorSource) -> None:
        for slot in (WEIGHT, *SLOTS):
            if slot in source.slots:
                for name, values in self.state[slot].items():
                    values[...] = source.read(name, slot, (0,) * values.ndim, values.shape)
        self.updates = int(source.scalars.get("optimizer_step", 0))

    def step(self, batch: Batch, *, step: int, learning_rate: float) -> StepResult:
        if FakeBackend.before_step is not None:
            FakeBackend.before_step(step)
        loss, count, gradients, _ = self._sums(batch)
        shared = self._all(
            {"loss": loss, "count": count, "gradients": {k: v.tolist() for k, v in gradients.items()}}
        )
        total = sum(rank["count"] for rank in shared)
        gradients = {
            name: sum(np.array(rank["gradients"][name]) for rank in shared) / total for name in gradients
        }
        norm = float(np.sqrt(sum(float((g * g).sum()) for g in gradients.values())))
        limit = self.plan.training.max_grad_norm
        scale = 1.0 if limit is None else min(1.0, limit / (norm + 1e-12))
        self._update({name: g * scale for name, g in gradients.items()}, learning_rate)
        mean = sum(rank["loss"] for rank in shared) / total
        return FakeResult(self, step, FakeBackend.loss_of(step, mean), norm)

    @contextlib.contextmanager
    def profile(self, directory: Path | None) -> Generator[None]:
        """The time of the step, which computes everything at once, shared out evenly over the plan's actions."""
        self._all("profile")
        begun = time.perf_counter()
        yield
        if directory is None:
            return
        rank, ended = self.place.rank, time.perf_counter()
        actions = [
            (action, part)
            for part in range(self.plan.training.accumulation)
            for action in self.plan.actions(rank)
        ]
        marks = np.linspace(begun, ended, len(actions) + 1).tolist()
        spans = tuple(
            MeasuredSpan(
                kind=action.kind.value,
                stage=action.stage,
                microbatch=action.microbatch,
                part=part,
                start=start,
                end=end,
            )
            for (action, part), (start, end) in zip(actions, pairwise(marks), strict=True)
        )
        events = [
            {
                "name": str(action),
                "ph": "X",
                "ts": start * 1e6,
                "dur": (end - start) * 1e6,
                "pid": rank,
                "tid": 0,
            }
            for (action, _), (start, end) in zip(actions, pairwise(marks), strict=True)
        ]
        trace_path(directory, rank).write_text(json.dumps({"traceEvents": events}))
        RankSpans(rank=rank, machine=machine(), met=begun, spans=spans).save(directory)

    def evaluate(self, batch: Batch, *, step: int) -> Evaluation:
        loss, count, _, confusion = self._sums(batch)
        shared = self._all([loss, count, confusion.tolist()])
        classes = np.sum([rank[2] for rank in shared], axis=0, dtype=np.int64)
        classifies = self.plan.training.classifies
        total, labels = (sum(rank[place] for rank in shared) for place in (0, 1))
        return Evaluation(total, labels, classes if classifies else None)

    def shards(self) -> RankState:
        here = self.plan.topology.coordinates(self.place.rank)
        parts = self.plan.degrees.sdp
        shards = [
            Shard(
                name,
                slot,
                values.shape,
                (first, *(0 for _ in values.shape[1:])),
                (last - first, *values.shape[1:]),
                lambda values=values, first=first, last=last: values[first:last].copy(),
            )
            for slot, arrays in self.state.items()
            for name, values in arrays.items()
            for first, last in [(len(values) * here.sdp // parts, len(values) * (here.sdp + 1) // parts)]
            if here.dp == 0 and last > first
        ]
        return RankState(shards, {"optimizer_step": self.updates})

    def close(self) -> None:
        self.peers = None

    def _all(self, value: Any) -> list[Any]:
        """Every rank's value, in rank order."""
        if self.peers is None:
            return [value]
        self.exchanges += 1
        self.peers.publish(f"exchange-{self.exchanges}", value)
        return self.peers.collect(f"exchange-{self.exchanges}")

    def _sums(self, batch: Batch) -> tuple[float, float, Arrays, NDArray[np.int64]]:
        """Sum of losses, number of labels, the gradient of that sum, and of each class how many were taken for which."""
        weights = {name: values.astype(np.float64) for name, values in self.state[WEIGHT].items()}
        gradients = {name: np.zeros_like(values) for name, values in weights.items()}
        assert {name: values.shape for name, values in batch.items()} == self.plan.batch_shapes
        ids, labels, pooling = _inputs(batch)
        table = "embedding.tokens.weight"
        head = next(
            name for name in ("head.classifier.weight", "head.output.weight", table) if name in weights
        )
        blocks = [f"blocks.{number}.feed_forward." for number in range(len(self.plan.description.blocks))]
        hidden = [weights[table][ids]]
        inner: list[NDArray[Any]] = []
        for block in blocks:
            inner.append(
                np.maximum(hidden[-1] @ weights[f"{block}up.weight"].T + weights[f"{block}up.bias"], 0)
            )
            hidden.append(
                hidden[-1] + inner[-1] @ weights[f"{block}down.weight"].T + weights[f"{block}down.bias"]
            )
        last = hidden[-1] if pooling is None else pooling @ hidden[-1]
        logits = last @ weights[head].T
        logits -= logits.max(axis=1, keepdims=True)
        logs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        rows = np.arange(len(labels))
        loss = float(-logs[rows, labels].sum())
        confusion = np.zeros((logits.shape[1],) * 2 if self.plan.training.classifies else (0, 0), np.int64)
        if confusion.size:
            np.add.at(confusion, (labels, logits.argmax(axis=1)), 1)

        up = np.exp(logs)  # the gradient that comes up from the loss
        up[rows, labels] -= 1
        gradients[head] += up.T @ last
        up = up @ weights[head]
        up = up if pooling is None else pooling.T @ up
        for number, block in reversed(list(enumerate(blocks))):
            gradients[f"{block}down.weight"] += up.T @ inner[number]
            gradients[f"{block}down.bias"] += up.sum(axis=0)
            inside = (up @ weights[f"{block}down.weight"]) * (inner[number] > 0)
            gradients[f"{block}up.weight"] += inside.T @ hidden[number]
            gradients[f"{block}up.bias"] += inside.sum(axis=0)
            up = up + inside @ weights[f"{block}up.weight"]
        np.add.at(gradients[table], ids, up)
        return loss, float(len(labels)), gradients, confusion

    def _update(self, gradients: Arrays, learning_rate: float) -> None:
        training = self.plan.training
        self.updates += 1
        first, second = training.betas
        for name, gradient in gradients.items():
            weight, average, square = (self.state[slot][name] for slot in (WEIGHT, *SLOTS))
            average[...] = first * average + (1 - first) * gradient
            square[...] = second * square + (1 - second) * gradient**2
            if self.decays[name]:
                weight *= np.float32(1 - learning_rate * training.weight_decay)
            corrected = np.sqrt(square / (1 - second**self.updates)) + training.epsilon
            weight -= (learning_rate / (1 - first**self.updates) * average / corrected).astype(np.float32)


def _inputs(batch: Batch) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any] | None]:
    """The ids that have a part in the loss, the labels, and how the labelled rows are the means of those ids' states; None:
    each id has its own label."""
    labels = batch["labels"].reshape(-1)
    valid = labels != IGNORED_LABEL
    if batch["labels"].shape == batch["input_ids"].shape:
        return batch["input_ids"].reshape(-1)[valid], labels[valid], None
    length = batch["input_ids"].shape[-1]
    mask = batch["attention_mask"].reshape(-1, length)
    assert mask.any(axis=1).all(), "a row has no token at all"
    row, _ = np.nonzero(mask[valid])
    pooling = (row == np.arange(valid.sum())[:, None]) / mask[valid].sum(axis=1, keepdims=True)
    return batch["input_ids"].reshape(-1, length)[valid][mask[valid] > 0], labels[valid], pooling


class FakeResult:
    def __init__(self, backend: FakeBackend, step: int, loss: float, norm: float) -> None:
        self._backend, self._step, self._loss, self._norm = backend, step, loss, norm

    def wait(self) -> None: ...

    def read(self, *, stop: bool = False) -> dict[str, float]:
        if self._backend.place.rank == 0:
            FakeBackend.reads.append(self._step + 1)
        stops = self._backend._all(stop)
        return {
            "loss": self._loss,
            "grad_norm": self._norm,
            "peak_memory_bytes": 1024.0,
            "stop": float(any(stops)),
        }


def install_for(patch: pytest.MonkeyPatch, site: Path) -> None:
    """Install this backend under the name "fake" in `site`, on the path of this process and of those that it starts."""
    folder = site / "mpsdk_fake-0.dist-info"
    folder.mkdir(parents=True)
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: mpsdk-fake\nVersion: 0\n")
    (folder / "entry_points.txt").write_text(
        f"[mpsdk.backends]\nfake = {__name__}:FakeBackend\n\n[mpsdk.limits]\nfake = {__name__}:limits\n"
    )
    patch.syspath_prepend(str(site))
    patch.setenv("PYTHONPATH", os.pathsep.join([str(site), str(ROOT)]))
    patch.setattr(FakeBackend, "reads", [])
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        patch.delenv(name, raising=False)
