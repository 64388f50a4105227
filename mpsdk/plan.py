"""The Plan: what a distribution became for one model and one world, as plain data.

Made only by `mpsdk.resolve.resolve`. Launchers carry it, backends execute it, the estimate costs it, a checkpoint's
manifest records it. Tables are by stage and tensor-parallel coordinate, and the schedule is stored by name, so a plan
for thousands of ranks stays small.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict

from mpsdk.config import Distribution, Pipeline, Training
from mpsdk.description import ModelDescription, TensorDescription
from mpsdk.schedule import Action, Schedule, generate
from mpsdk.topology import Degrees, Topology

if TYPE_CHECKING:
    from mpsdk.estimate import DeviceFigures, Estimate

EVALUATION_SCHEDULE = "forward-only"
LOOKAHEAD = 1  # receives are posted one compute action ahead of their use, so that they overlap with it


def training_schedule(pipeline: Pipeline, microbatches: int) -> Schedule:
    """The schedule that `pipeline` asks for, for one pass over `microbatches`."""
    return generate(
        pipeline.schedule, pipeline.degree, microbatches, pipeline.virtual_stages, lookahead=LOOKAHEAD
    )


def shared_rows(rows: int, sdp: int, degree: int) -> tuple[int, int]:
    """The rows [start, stop), of `rows`, of share `sdp` of `degree`: as `torch.chunk` cuts, into parts of
    ceil(rows / degree), until there are no more."""
    part = -(-rows // degree)
    return min(sdp * part, rows), min((sdp + 1) * part, rows)


@dataclass(frozen=True)
class LocalTensor:
    """The part of one canonical tensor that a tensor-parallel rank of a stage holds, before sharded data parallelism.

    `shape` is what is held, padding included; `valid` is the part of it that exists in the canonical tensor, standing
    at `offset` there. `owned` is False for a copy that another rank answers for: in the gradient norm and in a
    checkpoint every canonical element is counted by exactly one owner. `tied` marks both copies of a tensor that two
    stages hold, whose gradients are summed over `Plan.tied_group`.
    """

    tensor: TensorDescription
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    valid: tuple[int, ...]
    owned: bool
    tied: bool

    @property
    def name(self) -> str:
        return self.tensor.name

    def rows(self, sdp: int, degree: int) -> tuple[int, int]:
        """The rows [start, stop) of it at coordinate `sdp` of `degree`."""
        return shared_rows(self.shape[0], sdp, degree)

    def canonical_slice(self, start: int, stop: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Offset and shape, in the canonical tensor, of its rows [start, stop); padding left out."""
        rows = max(0, min(stop, self.valid[0]) - start)
        return (self.offset[0] + start, *self.offset[1:]), (rows, *self.valid[1:])


class Plan(BaseModel):
    """A resolved layout. JSON round trip by `save` and `load`; equal plans have equal `hash`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1] = 1
    framework: str
    world_size: int
    degrees: Degrees
    placement: str
    microbatches: int
    microbatch_size: int
    stages: tuple[tuple[int, int], ...]  # the blocks [start, stop) of each (virtual) stage
    schedule_hash: str
    padded_vocab_size: int
    distribution: Distribution
    training: Training
    description: ModelDescription

    # -- where ranks stand ------------------------------------------------------------------------------------------

    @cached_property
    def topology(self) -> Topology:
        return Topology(self.degrees, self.placement)

    @property
    def data_size(self) -> int:
        return self.topology.data_size

    @cached_property
    def schedule(self) -> Schedule:
        """The training schedule, expanded; checked against the hash that was planned."""
        schedule = training_schedule(self.distribution.pipeline, self.microbatches)
        if schedule.hash != self.schedule_hash:
            raise ValueError(
                f"schedule {schedule.name!r} expands to {schedule.hash}, and the plan was made with "
                f"{self.schedule_hash}: it comes from another version of mpsdk; plan again"
            )
        return schedule

    @cached_property
    def evaluation_schedule(self) -> Schedule:
        pipeline = self.distribution.pipeline
        return generate(
            EVALUATION_SCHEDULE,
            self.degrees.pp,
            self.microbatches,
            pipeline.virtual_stages,
            self.schedule.stage_rank,
            lookahead=LOOKAHEAD,
        )

    def actions(self, rank: int) -> tuple[Action, ...]:
        """What `rank` does in one pass over its microbatches, in order."""
        return self.schedule.actions[self.topology.coordinates(rank).pp]

    def stages_of(self, rank: int) -> tuple[int, ...]:
        """The stages that `rank` owns, lowest first."""
        pp = self.topology.coordinates(rank).pp
        return tuple(stage for stage, owner in enumerate(self.schedule.stage_rank) if owner == pp)

    @property
    def batch_shapes(self) -> dict[str, tuple[int, ...]]:
        """The arrays of a data rank's batch, see `mpsdk.backend.Batch`, and their shapes.

        Packed text is never padded; what has labels of its own is.
        """
        rows = (self.training.accumulation, self.microbatches, self.microbatch_size)
        tokens = (*rows, self.training.sequence_length)
        objective, spec = self.training.objective, self.description.spec
        shapes = {"input_ids": tokens, "labels": rows if objective == "sequence-classification" else tokens}
        if objective != "causal-lm":
            shapes["attention_mask"] = tokens
            if spec is not None and spec.token_types > 1:
                shapes["token_type_ids"] = tokens
        return shapes

    # -- what each of them holds ------------------------------------------------------------------------------------

    def stage_tensors(self, stage: int, tp: int) -> tuple[LocalTensor, ...]:
        """What tensor-parallel coordinate `tp` of `stage` holds: embedding on the first stage, head on the last."""
        model = self.description
        first, last = stage == 0, stage == len(self.stages) - 1
        start, stop = self.stages[stage]
        tensors = [
            *(model.embedding if first else ()),
            *(tensor for block in range(start, stop) for tensor in model.block_tensors(block)),
            *(model.head if last else ()),
        ]
        return tuple(self._cut(tensor, tp) for tensor in tensors if not (first and last and tensor.tied_to))

    def units(self, stage: int, tp: int) -> tuple[tuple[LocalTensor, ...], ...]:
        """The tensors of `stage_tensors` by what is gathered and reduced together under sharded data parallelism: the
        embedding, each block, the head; embedding and head are one unit where a tensor ties them on one stage."""
        joined = len(self.stages) == 1 and any(tensor.tied_to for tensor in self.description.head)
        found: dict[tuple[str, int | None], list[LocalTensor]] = {}
        for held in self.stage_tensors(stage, tp):
            part = held.tensor.part
            found.setdefault(("ends" if joined and part != "block" else part, held.tensor.block), []).append(
                held
            )
        return tuple(map(tuple, found.values()))

    def _cut(self, tensor: TensorDescription, tp: int) -> LocalTensor:
        offset, shape = [0] * len(tensor.shape), list(tensor.shape)
        valid = list(tensor.shape)
        dimension, degree = tensor.cut_dimension, self.degrees.tp
        if dimension is not None:
            whole = self.padded_vocab_size if tensor.role == "vocab" else tensor.shape[dimension]
            part = whole // degree
            offset[dimension], shape[dimension] = min(tp * part, tensor.shape[dimension]), part
            valid[dimension] = max(0, min(part, tensor.shape[dimension] - tp * part))
        owned = tensor.tied_to is None and (dimension is not None or tp == 0)
        owners = {other.tied_to for other in self.description.head}
        tied = self.tied_across_stages and (tensor.tied_to is not None or tensor.name in owners)
        return LocalTensor(tensor, tuple(offset), tuple(shape), tuple(valid), owned, tied)

    @property
    def tied_across_stages(self) -> bool:
        """Whether a head tensor is a copy of an embedding that another stage holds."""
        return len(self.stages) > 1 and any(tensor.tied_to for tensor in self.description.head)

    def tied_group(self, rank: int) -> tuple[int, ...] | None:
        """The two ranks, first stage then last, that hold copies of one tied tensor. None if `rank` holds no copy
        or holds both."""
        if not self.tied_across_stages:
            return None
        owners = (self.schedule.stage_rank[0], self.schedule.stage_rank[-1])
        place = self.topology.coordinates(rank)
        if owners[0] == owners[1] or place.pp not in owners:
            return None
        return tuple(self.topology.rank_of(place._replace(pp=pp)) for pp in owners)

    # -- counts -----------------------------------------------------------------------------------------------------

    @property
    def tokens_per_step(self) -> int:
        return self.training.global_batch * self.training.sequence_length

    def estimate(self, device: str | os.PathLike[str] | DeviceFigures = "gpu") -> Estimate:
        """Bytes, FLOPs and messages of each rank, and with a device's figures its verdict and the time of a step.

        Args:
            device: "gpu", "cpu", a name such as "h100", a file of figures, or figures. See `mpsdk.estimate`.

        Raises:
            ConfigError: the device is not known.
        """
        from mpsdk.estimate import estimate

        return estimate(self, device=device)

    # -- plain data -------------------------------------------------------------------------------------------------

    @cached_property
    def hash(self) -> str:
        """Sixteen hexadecimal digits, equal for equal plans on every machine."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()

    def to_json(self) -> str:
        return json.dumps(self.model_dump(mode="json"), indent=1)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        return cls.model_validate_json(text)

    def save(self, path: str | Path) -> None:
        Path(path).write_text(self.to_json(), encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        return cls.from_json(Path(path).read_text(encoding="utf-8"))

    def __str__(self) -> str:
        from mpsdk.report.plan_table import plan_text

        return plan_text(self)
