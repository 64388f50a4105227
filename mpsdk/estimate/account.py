"""Account: what one pipeline rank has to do and to hold, in numbers; what memory, messages and FLOPs are reckoned from."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Literal

from mpsdk.estimate.frameworks import Attention, Device, Level, attention_kernel, framework_of
from mpsdk.estimate.sizes import COMPUTE_BYTES, FP32, sizes_of
from mpsdk.estimate.states import ShareClass, Unit, UnitKind, shard_elements, share_classes, stage_units
from mpsdk.plan import Plan
from mpsdk.schedule import Kind

ENDS = "embedding and head"


class Account:
    """The pipeline rank at coordinate `pp` of `plan`, on one kind of device.

    `sizes` is None for a model that is known by its tensors only; then what depends on its layers stays out.
    """

    def __init__(self, plan: Plan, device: Device, pp: int) -> None:
        self.plan, self.device, self.pp = plan, device, pp
        self.framework = framework_of(plan.framework)
        self.kernels = self.framework.kernels[device]
        self.sizes = sizes_of(plan)
        self.compute = COMPUTE_BYTES[plan.distribution.precision.mode]
        self.degree = plan.degrees.sdp
        sharded = plan.distribution.sharded_data_parallel
        level: Level = (
            sharded.level if self.degree > 1 else "optimizer"
        )  # with one share there is nothing to share
        self.sharding = self.framework.sharding[level]
        self.prefetch = sharded.prefetch
        self.recompute = plan.distribution.activation_checkpointing
        self.stages = tuple(stage for stage, owner in enumerate(plan.schedule.stage_rank) if owner == pp)

    # -- stages -----------------------------------------------------------------------------------------------------

    def is_first(self, stage: int) -> bool:
        return stage == 0

    def is_last(self, stage: int) -> bool:
        return stage == len(self.plan.stages) - 1

    @property
    def has_last(self) -> bool:
        return self.is_last(self.stages[-1])

    def blocks(self, stage: int) -> int:
        start, stop = self.plan.stages[stage]
        return stop - start

    def block_kinds(self, stage: int) -> tuple[str, ...]:
        """The kind of each block of `stage`."""
        start, stop = self.plan.stages[stage]
        return self.plan.description.blocks[start:stop]

    @property
    def attention(self) -> Attention:
        """Which attention kernel runs."""
        spec = self.plan.description.spec
        return "fused" if spec is None else attention_kernel(spec, self.kernels, fp32=self.compute == FP32)

    @property
    def backwards(self) -> int:
        """Backwards of a stage in a step."""
        return self.plan.microbatches * self.plan.training.accumulation

    def most_in_flight(self, kept: Mapping[int, int], put_off: Mapping[int, int] | None = None) -> int:
        """The most that microbatches in flight take together.

        Args:
            kept: what one takes, by stage, from its forward until its backward.
            put_off: what one takes from a backward of inputs until that of weights; None: as much as before.
        """
        put_off = kept if put_off is None else put_off
        held = most = 0
        for kind, stage, _ in self.plan.schedule.actions[self.pp]:
            if kind is Kind.FORWARD:
                held += kept[stage]
            elif kind is Kind.BACKWARD:
                held -= kept[stage]
            elif kind is Kind.BACKWARD_INPUT:
                held += put_off[stage] - kept[stage]
            elif kind is Kind.BACKWARD_WEIGHT:
                held -= put_off[stage]
            most = max(most, held)
        return most

    # -- states -----------------------------------------------------------------------------------------------------

    @cached_property
    def units(self) -> dict[int, tuple[Unit, ...]]:
        return {stage: stage_units(self.plan, stage) for stage in self.stages}

    @cached_property
    def all_units(self) -> tuple[Unit, ...]:
        return tuple(unit for units in self.units.values() for unit in units)

    @cached_property
    def shares(self) -> list[ShareClass]:
        return share_classes(self.all_units, self.degree)

    @cached_property
    def whole(self) -> int:
        """Elements of this rank's stages before sharded data parallelism."""
        return sum(unit.elements for unit in self.all_units)

    def largest(self, *kinds: UnitKind) -> int:
        """Elements of the largest unit of these kinds, as collectives carry it; 0 if there is none here."""
        return max((unit.padded(self.degree) for unit in self.all_units if unit.kind in kinds), default=0)

    @property
    def copies(self) -> bool:
        """Whether layers compute with other buffers than those that are updated."""
        return self.compute != FP32 or (self.degree > 1 and self.sharding.shares_parameters)

    @property
    def reduces_each(self) -> bool:
        """Whether gradients are reduced after each backward of a step."""
        return self.sharding.shares_gradients or (self.copies and self.backwards == 1)

    def reducing(self, unit: Literal["earlier", "head", "block"]) -> int:
        """Bytes of gradients that are still being reduced while the next backward goes on: those of the microbatch
        before, of the head, or of a block."""
        if not (self.copies and self.reduces_each):
            return 0
        if len(self.stages) > 1:  # whichever stage had its backward before
            return FP32 * self.largest("embedding", "block", "head")
        if unit == "head" and self.largest("head"):
            return FP32 * self.largest("head")
        if unit == "block":
            return FP32 * self.largest("block")
        return FP32 * self.all_units[0].padded(self.degree) if self.backwards > 1 else 0

    def gathered(self, ahead: int) -> int:
        """Bytes of whole weights while one unit computes and `ahead` of its neighbours are gathered too."""
        if not self.copies:
            return 0
        if self.sharding.gathers == "stage":
            return self.compute * sum(unit.padded(self.degree) for unit in self.all_units)
        # Embedding and head in one unit are whole as long as either is needed: all the time.
        always = sum(unit.padded(self.degree) for unit in self.all_units if unit.kind == ENDS)
        passing = [[u.padded(self.degree) for u in units if u.kind != ENDS] for units in self.units.values()]
        windows = (sum(stage[at : at + 1 + ahead]) for stage in passing for at in range(len(stage)))
        return self.compute * (always + max(windows))

    def turns(self, stage: int, unit: int) -> bool:
        """Whether unit number `unit` of `stage` stays whole between its forward and its backward: the last block and the
        head, where the one follows directly on the other."""
        if not (self.is_last(stage) and self.plan.schedule.turns_at_once):
            return False
        kinds = [one.kind for one in self.units[stage]]
        return kinds[unit] in ("head", ENDS) or (kinds[unit] == "block" and "block" not in kinds[unit + 1 :])

    @property
    def gathered_for_loss(self) -> int:
        """Bytes of whole weights while the loss is made, where weights are gathered block by block."""
        if not self.copies:
            return 0
        stage = self.stages[-1]
        return self.compute * sum(
            unit.padded(self.degree)
            for number, unit in enumerate(self.units[stage])
            if self.turns(stage, number)
        )

    def gathers_in_vain(self, stage: int) -> int:
        """Gathers of the last unit of `stage` that nobody waits for, in a step.

        Where a framework prefetches by the order of past forwards, the first unit's backward gathers what came before
        it: the last unit, of an earlier microbatch. That serves whatever comes next, except at the end of a step, and
        except when the step has no earlier microbatch that the stage had already let go.
        """
        units = self.units[stage]
        if self.sharding.gathers != "block" or not self.framework.prefetches_by_past_order or len(units) == 1:
            return 0
        if units[0].kind == ENDS:
            return 0  # the last unit is the embedding's too, and whole until its backward, the last of all
        return 1 if self.plan.training.accumulation > 1 or self._empties(stage) else 0

    def _empties(self, stage: int) -> bool:
        """Whether, before the end of a pass, `stage` has a moment without a forward whose backward has not begun."""
        held = emptied = 0
        for kind, where, _ in self.plan.schedule.actions[self.pp]:
            if where == stage and kind is Kind.FORWARD:
                held += 1
            elif where == stage and (kind is Kind.BACKWARD or kind is Kind.BACKWARD_INPUT):
                held -= 1
                emptied += held == 0
        return emptied > 1

    def flat(self, share: ShareClass) -> tuple[int, int]:
        """Elements of the flat sums before an update: of tied tensors, and of replicated tensors of which each
        tensor-parallel rank has found a part of the gradient only."""
        copied = self.plan.schedule.stage_rank[0] != self.plan.schedule.stage_rank[-1]
        tied = replicated = 0
        for unit in self.all_units:
            for shape, split, twice in zip(unit.shapes, unit.split, unit.tied, strict=True):
                elements = shard_elements(shape, share.start, self.degree)
                tied += elements if twice and copied else 0
                replicated += elements if split else 0
        return tied, replicated

    # -- recompute --------------------------------------------------------------------------------------------------

    @property
    def offloads(self) -> bool:
        """Whether inputs of blocks go to other memory than the device's own."""
        return self.recompute.offload and self.device != "cpu"

    @property
    def stops_early(self) -> bool:
        """Whether a block that is computed again stops at its down projection, whose result no backward needs.

        PyTorch's checkpoint without reentrance stops at the last tensor that a backward needs; dropout after the down
        projection needs its mask, and a norm after it its result.
        """
        spec = self.plan.description.spec
        if spec is not None and spec.norm_position == "after":
            return False
        if self._cuts:
            return True
        dropped = spec is not None and spec.dropout.residual > 0
        early = self.framework.recomputes == "until the last kept"
        return early and not self.recompute.offload and not dropped

    @property
    def stops_before_product(self) -> bool:
        """Whether it stops before that projection's product, not after it: a linear layer that can put off its weight
        gradient is one operation to PyTorch, which keeps its input when all of it is done."""
        return self.stops_early and (self._cuts or not self.plan.schedule.splits_backward)

    @property
    def leaves_again(self) -> int:
        """How many of a block's two tensor-parallel regions are left again when it is computed again."""
        spec = self.plan.description.spec
        if self._cuts and spec is not None and spec.residual != "sequential":
            return 0  # neither sum is read
        return 1 if self.stops_early else 2

    def is_looked_up(self, unit: Unit) -> bool:
        """Whether a unit's backward needs no weights, as that of a lookup."""
        spec = self.plan.description.spec
        return unit.kind == "embedding" and not (spec is not None and spec.embedding_norm)

    @property
    def _cuts(self) -> bool:
        """Whether a block computes again only what its backward reads."""
        return self.framework.recomputes == "what is read"
