"""Bytes on each rank, by what they are for and by the moment of a step at which they are there together."""

from __future__ import annotations

from dataclasses import dataclass

from mpsdk.estimate.account import ENDS, Account
from mpsdk.estimate.activations import (
    Kept,
    block_put_off,
    block_workspace,
    embedding_kept,
    head_kept,
    head_put_off,
    head_workspace,
    loss_workspace,
    recompute_kept,
)
from mpsdk.estimate.sizes import FP32, Sizes
from mpsdk.estimate.states import ShareClass, moments

# What bytes are for.
PARAMETERS = "parameters"  # the fp32 weights that are updated
OPTIMIZER = "optimizer"
GRADIENTS = "gradients"  # fp32 sums, between the backwards of a step
GATHERED = "gathered"  # whole weights, in the compute dtype, that layers compute with
ACTIVATIONS = "activations"  # kept from forwards for their backwards
WORKSPACE = "workspace"  # what comes and goes within one layer's backward
BUFFERS = "buffers"  # of collectives and messages
INPUTS = "inputs"  # ids and labels of a step, tables of rotary positions

# Moments of a step. One of them is a rank's peak.
BETWEEN = "between steps"
LOSS = "loss"
HEAD = "head backward"
FIRST = "first backward"  # of the block that comes first in the backward, when most is kept
SECOND = "second backward"  # of the next, while gradients of the first are reduced
REDUCE = "reduction"  # of the gradients of a block, the embedding or the head
LAST = "last backward"  # of the block that comes last, where no earlier backward has left gradients
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


def memory_of(account: Account, share: ShareClass) -> RankMemory:
    """The memory of the ranks of `account` that hold `share`."""
    sizes, state = account.sizes, _state(account, share)
    _, replicated = account.flat(share)  # a tied tensor's gradient is summed where it is
    update = {GRADIENTS: FP32 * share.elements, BUFFERS: FP32 * replicated}
    host = {stage: account.blocks(stage) * sizes.hidden if sizes else 0 for stage in account.stages}
    return RankMemory(
        pp=account.pp,
        sdp=(share.start, share.stop),
        elements=share.elements,
        in_flight=account.most_in_flight(dict.fromkeys(account.stages, 1)),
        kept={stage: _kept(account, sizes, stage) for stage in account.stages} if sizes else {},
        moments={BETWEEN: state, **_pass(account, share, state), UPDATE: state | update},
        host=account.most_in_flight(host) if account.offloads else 0,
    )


def _state(account: Account, share: ShareClass) -> Bytes:
    """What is there all the time."""
    plan, spec, sizes = account.plan, account.plan.description.spec, account.sizes
    optimizer = moments(plan.training) * share.elements
    if plan.training.optimizer == "adamw":
        optimizer += share.tensors  # each has a step counter
    ids = plan.training.global_batch // plan.data_size * plan.training.sequence_length
    turns = 0
    if spec is not None and spec.positions == "rotary" and sizes is not None:
        turns = 2 * sizes.length * sizes.head_size * sizes.compute  # cosines and sines, for each stage
    return {
        PARAMETERS: FP32 * (share.elements if account.sharding.shares_parameters else account.whole),
        OPTIMIZER: FP32 * optimizer,
        INPUTS: 2 * ids * account.framework.index_bytes + len(account.stages) * turns,
    }


def _kept(account: Account, sizes: Sizes, stage: int) -> Kept:
    """What one microbatch keeps on the device, on `stage`: the embedding's, each block's, the head's."""
    spec = account.plan.description.spec
    assert spec is not None
    block = recompute_kept(spec, sizes, account.kernels, account.recompute)
    kept = {name: account.blocks(stage) * size for name, size in block.items()}
    if account.offloads:
        kept.pop("input")
    if account.is_first(stage):
        kept |= embedding_kept(spec, sizes, account.kernels)
    elif "input" not in kept:
        kept["received"] = sizes.hidden  # else the first block's input is what was received
    if account.is_last(stage):
        kept |= head_kept(spec, sizes, account.kernels)
    return kept


def _pass(account: Account, share: ShareClass, state: Bytes) -> dict[str, Bytes]:
    """The moments of a pass over the microbatches."""
    sizes, spec, kernels = account.sizes, account.plan.description.spec, account.kernels
    many = account.backwards > 1  # else a backward finds no gradients of earlier ones
    gradients = FP32 * (share.elements if account.reduces_each else account.whole)
    common = state | {GRADIENTS: gradients * many, GATHERED: account.gathered(account.prefetch)}
    if sizes is None or spec is None:
        return {FIRST: common}
    kept = {stage: sum(_kept(account, sizes, stage).values()) for stage in account.stages}
    activations = account.most_in_flight(kept, _put_off(account, sizes, gated=spec.gated))
    head = sum(head_kept(spec, sizes, kernels).values()) if account.has_last else 0
    block = sum(recompute_kept(spec, sizes, kernels, account.recompute).values())
    found: dict[str, Bytes] = {}
    if account.has_last:
        whole = {ACTIVATIONS: activations, BUFFERS: account.reducing("earlier")}
        found[LOSS] = common | whole | {WORKSPACE: loss_workspace(sizes, kernels)}
        if account.sharding.gathers == "block":  # other weights have been let go before the loss
            found[LOSS] |= {GATHERED: account.gathered_for_loss}
        found[HEAD] = common | whole | {WORKSPACE: head_workspace(sizes, kernels)}
    workspace = {WORKSPACE: block_workspace(spec, sizes, kernels, account.recompute)}
    before = {BUFFERS: account.reducing("head" if account.has_last else "earlier")}
    between = {BUFFERS: account.reducing("block")}
    found[FIRST] = common | {ACTIVATIONS: activations - head} | workspace | before
    found[SECOND] = common | {ACTIVATIONS: activations - head - block} | workspace | between
    if account.copies:
        one = max(kept.values())
        found[REDUCE] = common | _reduction(account, in_flight=activations, one=one, head=head, block=block)
    elif (
        account.plan.data_size > 1
    ):  # the gradients that the last backward makes last, joined into one buffer
        whole, last = FP32 * account.whole, FP32 * account.largest("embedding", ENDS)
        found[REDUCE] = common | {GRADIENTS: whole, BUFFERS: last or FP32 * account.largest("block")}
    if not many:
        found[LAST] = common | {GRADIENTS: gradients, ACTIVATIONS: block} | workspace | between
    messages = _messages(account, sizes)
    return {moment: held | {BUFFERS: held[BUFFERS] + messages} for moment, held in found.items()}


def _reduction(account: Account, *, in_flight: int, one: int, head: int, block: int) -> Bytes:
    """The fullest of the moments in which the gradients of a unit have been made and are to be reduced.

    Args:
        in_flight: bytes that all microbatches in flight keep.
        one: what one of them keeps; `head` and `block`: of that, what the head keeps, and one block.
    """
    each = account.reduces_each
    most = in_flight if each else one  # the last backward of a step has only its own microbatch left
    left = {  # when the unit's own activations and those after it have been let go
        account.largest("head"): most - head,
        account.largest("block"): most - head - block,
        account.largest("embedding", "embedding and head"): most - one,
    }
    unit = max(left, key=lambda unit: unit * (account.compute + FP32) + left[unit])
    return {
        ACTIVATIONS: left[unit],
        WORKSPACE: account.compute * unit if each else 0,  # else among the gradients already
        BUFFERS: FP32 * (unit + unit // account.degree),
    }


def _put_off(account: Account, sizes: Sizes, *, gated: bool) -> dict[int, int]:
    """Bytes that one microbatch keeps between the two parts of a split backward, by stage."""
    block, head = block_put_off(sizes, gated=gated), head_put_off(sizes)
    return {
        stage: account.blocks(stage) * sum(block.values())
        + (sum(head.values()) if account.is_last(stage) else 0)
        for stage in account.stages
    }


def _messages(account: Account, sizes: Sizes) -> int:
    """Hidden states and gradients on their way to and from other stages, and a copy for a tensor-parallel collective.

    What is received in a forward is an activation; the rest waits here.
    """
    ways = 0
    if account.plan.degrees.pp > 1:
        ways = sum(
            (not account.is_first(stage)) + 2 * (not account.is_last(stage)) for stage in account.stages
        )
    return ways * sizes.hidden + (sizes.whole_hidden if sizes.tensor_parallel > 1 else 0)
