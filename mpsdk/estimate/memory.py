"""Bytes on each rank, by what they are for and by the moment of a step at which they are there together."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from mpsdk.estimate.activations import (
    Kept,
    block_workspace,
    embedding_kept,
    head_kept,
    head_workspace,
    loss_workspace,
    recompute_kept,
)
from mpsdk.estimate.frameworks import Device, Level, framework_of
from mpsdk.estimate.sizes import COMPUTE_BYTES, FP32, INDEX, Sizes, sizes_of
from mpsdk.estimate.states import ShareClass, Unit, moments, shard_elements, share_classes, stage_units
from mpsdk.plan import Plan
from mpsdk.schedule import Kind

# What bytes are for.
PARAMETERS = "parameters"  # the fp32 weights that are updated
OPTIMIZER = "optimizer"
GRADIENTS = "gradients"  # fp32 sums, between the backwards of a step
GATHERED = "gathered"  # whole weights, in the compute dtype, that layers compute with
ACTIVATIONS = "activations"  # kept from forwards for their backwards
WORKSPACE = "workspace"  # what comes and goes within one layer's backward
BUFFERS = "buffers"  # of collectives and messages
INPUTS = "inputs"  # ids and labels of one pass, tables of rotary positions

# Moments of a step. One of them is a rank's peak.
BETWEEN = "between steps"
LOSS = "loss"
HEAD = "backward of the head"
FIRST = "backward of the first block"  # the first in the order of the backward, when nothing has been let go
REDUCE = "reduction of a block's gradients"
LAST = "backward of the last block"
UPDATE = "update"

Bytes = dict[str, int]


@dataclass(frozen=True)
class RankMemory:
    """The memory of the ranks at pipeline coordinate `pp` and sdp coordinates [start, stop), whatever their others.

    `elements`: what each holds of the model's parameters, and so of reduced gradients and of each optimizer moment.
    `in_flight`: the most microbatches in flight, over all stages of the rank. `kept`: bytes that one of them keeps, by
    stage and buffer. `moments`: bytes by moment and by use. `host`: bytes of activations moved to CPU memory.
    """

    pp: int
    sdp: tuple[int, int]
    elements: int
    in_flight: int
    kept: dict[int, Kept]
    moments: dict[str, Bytes]
    host: int

    @property
    def activations_of_one(self) -> int:
        """Bytes that one microbatch keeps from its forwards until its backwards, on all stages of the rank."""
        return sum(sum(kept.values()) for kept in self.kept.values())

    @property
    def peak_at(self) -> str:
        """The moment at which most is held."""
        return max(self.moments, key=lambda moment: sum(self.moments[moment].values()))

    @property
    def peak(self) -> int:
        return sum(self.moments[self.peak_at].values())

    @property
    def between_steps(self) -> int:
        return sum(self.moments[BETWEEN].values())


def memory_of(plan: Plan, device: Device) -> tuple[RankMemory, ...]:
    """Memory by pipeline coordinate and, where shares differ, by sdp coordinate; the fullest ranks of a stage first."""
    accounts = (_Account(plan, device, pp) for pp in range(plan.degrees.pp))
    return tuple(account.memory(share) for account in accounts for share in account.shares)


class _Account:
    """What one pipeline rank holds. `sizes` None: a model of unknown layers, whose activations stay out."""

    def __init__(self, plan: Plan, device: Device, pp: int) -> None:
        self.plan, self.device, self.pp = plan, device, pp
        self.framework = framework_of(plan.framework)
        self.kernels = self.framework.kernels[device]
        self.sizes = sizes_of(plan)
        self.compute = COMPUTE_BYTES[plan.distribution.precision.mode]
        self.degree = plan.degrees.sdp
        sharded = plan.distribution.sharded_data_parallel
        level: Level = sharded.level if self.degree > 1 else "optimizer"
        self.sharding = self.framework.sharding[level]
        self.prefetch = sharded.prefetch
        self.recompute = plan.distribution.activation_checkpointing
        self.stages = tuple(stage for stage, owner in enumerate(plan.schedule.stage_rank) if owner == pp)
        self.units = {stage: stage_units(plan, stage) for stage in self.stages}

    # -- states -----------------------------------------------------------------------------------------------------

    @cached_property
    def all_units(self) -> tuple[Unit, ...]:
        return tuple(unit for units in self.units.values() for unit in units)

    @cached_property
    def shares(self) -> list[ShareClass]:
        return share_classes(self.all_units, self.degree)

    @property
    def whole(self) -> int:
        """Elements of this rank's stages before sharded data parallelism."""
        return sum(unit.elements for unit in self.all_units)

    @property
    def backwards(self) -> int:
        """Backwards of a stage in a step."""
        return self.plan.microbatches * self.plan.training.accumulation

    @property
    def copies(self) -> bool:
        """Whether layers compute with other buffers than those that are updated."""
        shared = self.degree > 1 and self.sharding.shares_parameters
        eager = self.framework.gathers_copies and self.plan.data_size > 1
        return shared or eager or self.compute != FP32

    def _gathered(self, ahead: int) -> int:
        """Bytes of whole weights while one unit computes and `ahead` of its neighbours are gathered too."""
        if not self.copies:
            return 0
        sizes = [[unit.padded(self.degree) for unit in units] for units in self.units.values()]
        if self.sharding.gathers == "stage":
            return self.compute * sum(map(sum, sizes))
        return self.compute * max(
            sum(stage[at : at + 1 + ahead]) for stage in sizes for at in range(len(stage))
        )

    @cached_property
    def _unit(self) -> int:
        """Elements of the largest unit."""
        return max(unit.padded(self.degree) for unit in self.all_units)

    def _gradients(self, share: ShareClass) -> int:
        """Bytes of gradient sums between two backwards of a step."""
        return FP32 * (share.elements if self._reduces_each else self.whole)

    @property
    def _reduces_each(self) -> bool:
        """Whether gradients are reduced after each backward of a step."""
        return self.sharding.shares_gradients or (self.copies and self.backwards == 1)

    # -- activations ------------------------------------------------------------------------------------------------

    def _kept(self, sizes: Sizes, stage: int) -> Kept:
        """What one microbatch keeps on the device, on `stage`: the embedding's, each block's, the head's."""
        spec = self.plan.description.spec
        assert spec is not None
        start, stop = self.plan.stages[stage]
        block = recompute_kept(spec, sizes, self.kernels, self.recompute)
        kept = {name: (stop - start) * size for name, size in block.items()}
        if self._offloads:
            kept.pop("input")
        if stage == 0:
            kept |= embedding_kept(spec, sizes, self.kernels)
        elif "input" not in kept:
            kept["received"] = sizes.hidden  # else the first block's input is what was received
        if stage == len(self.plan.stages) - 1:
            kept |= head_kept(spec, sizes, self.kernels)
        return kept

    @property
    def _offloads(self) -> bool:
        return self.recompute.offload and self.device != "cpu"

    def _peak(self, bytes_of: dict[int, int]) -> int:
        """The most that microbatches in flight take, when one takes `bytes_of[stage]` from its forward to its backward."""
        held = peak = 0
        for kind, stage, _ in self.plan.schedule.actions[self.pp]:
            if kind is Kind.FORWARD:
                held += bytes_of[stage]
                peak = max(peak, held)
            elif kind is Kind.BACKWARD or kind is Kind.BACKWARD_WEIGHT:
                held -= bytes_of[stage]
        return peak

    # -- moments ----------------------------------------------------------------------------------------------------

    def memory(self, share: ShareClass) -> RankMemory:
        shared = self.sharding.shares_parameters
        optimizer = moments(self.plan.training) * share.elements
        if self.plan.training.optimizer == "adamw":
            optimizer += share.tensors  # each has a step counter
        state = {
            PARAMETERS: FP32 * (share.elements if shared else self.whole),
            OPTIMIZER: FP32 * optimizer,
            INPUTS: self._inputs,
        }
        gradients = self._gradients(share)
        update = {GRADIENTS: FP32 * share.elements, BUFFERS: FP32 * self._flat(share)}
        found = {BETWEEN: state, **self._compute_moments(state, gradients), UPDATE: state | update}
        blocks = {stage: self.plan.stages[stage][1] - self.plan.stages[stage][0] for stage in self.stages}
        host = {stage: count * self.sizes.hidden for stage, count in blocks.items()} if self.sizes else {}
        kept = {stage: self._kept(self.sizes, stage) for stage in self.stages} if self.sizes else {}
        return RankMemory(
            pp=self.pp,
            sdp=(share.start, share.stop),
            elements=share.elements,
            in_flight=self._peak(dict.fromkeys(self.stages, 1)),
            kept=kept,
            moments=found,
            host=self._peak(host) if self._offloads and host else 0,
        )

    def _compute_moments(self, state: Bytes, gradients: int) -> dict[str, Bytes]:
        """The moments of a pass over the microbatches."""
        sizes, spec = self.sizes, self.plan.description.spec
        if sizes is None or spec is None:
            return {FIRST: state | {GRADIENTS: gradients, GATHERED: self._gathered(self.prefetch)}}
        kept = {stage: sum(self._kept(sizes, stage).values()) for stage in self.stages}
        block = sum(recompute_kept(spec, sizes, self.kernels, self.recompute).values())
        at_once = state | {ACTIVATIONS: self._peak(kept), GATHERED: self._gathered(self.prefetch)}
        if self.backwards > 1:
            at_once[GRADIENTS] = gradients
        unit, messages = self._unit if self.copies else 0, self._messages(sizes)
        workspace = block_workspace(spec, sizes, self.kernels, self.recompute)
        found: dict[str, Bytes] = {}
        at_block = self._peak(kept)
        if len(self.plan.stages) - 1 in self.stages:
            at_block -= sum(head_kept(spec, sizes, self.kernels).values())  # the head's backward has been
            head = self.compute * self.units[len(self.plan.stages) - 1][-1].padded(self.degree)
            whole = at_once[GATHERED] if self.sharding.gathers == "stage" else head
            found[LOSS] = at_once | {GATHERED: whole, WORKSPACE: loss_workspace(sizes), BUFFERS: messages}
            found[HEAD] = at_once | {WORKSPACE: head_workspace(sizes), BUFFERS: messages}
        reducing = FP32 * unit if self._reduces_each else 0
        found[FIRST] = at_once | {
            ACTIVATIONS: at_block,
            WORKSPACE: workspace,
            BUFFERS: messages + reducing,
        }
        if unit:
            found[REDUCE] = at_once | {
                ACTIVATIONS: (at_block if self._reduces_each else max(kept.values())) - block,
                WORKSPACE: self.compute * unit if self._reduces_each else 0,
                BUFFERS: messages + FP32 * (unit + unit // self.degree),
            }
        if self.backwards == 1:
            found[LAST] = state | {
                GRADIENTS: gradients,
                ACTIVATIONS: block,
                GATHERED: at_once[GATHERED],
                WORKSPACE: workspace,
                BUFFERS: messages + reducing,
            }
        return found

    @property
    def _inputs(self) -> int:
        ids = self.plan.microbatches * self.plan.microbatch_size * self.plan.training.sequence_length
        spec, sizes = self.plan.description.spec, self.sizes
        turns = 0
        if sizes is not None and spec is not None and spec.positions == "rotary":
            turns = 2 * sizes.length * sizes.head_size * sizes.compute  # cosines and sines, for each stage
        return 2 * ids * INDEX + len(self.stages) * turns

    def _messages(self, sizes: Sizes) -> int:
        """Hidden states and gradients on their way to and from other stages, and a copy for a tensor-parallel collective.

        What is received in a forward is an activation; the rest waits here.
        """
        last = len(self.plan.stages) - 1
        ways = (
            sum((stage > 0) + 2 * (stage < last) for stage in self.stages) if self.plan.degrees.pp > 1 else 0
        )
        return ways * sizes.hidden + (sizes.whole_hidden if sizes.tensor_parallel > 1 else 0)

    def _flat(self, share: ShareClass) -> int:
        """Elements of the larger of the two flat messages before an update: tied, or split by the sequence."""
        sequence_parallel = self.sizes is not None and self.sizes.sequence_parallel
        tied = replicated = 0
        for unit in self.all_units:
            for shape, whole, twice in zip(unit.shapes, unit.replicated, unit.tied, strict=True):
                elements = shard_elements(shape, share.start, self.degree)
                tied += elements if twice else 0
                replicated += elements if whole and sequence_parallel else 0
        return max(tied, replicated)
