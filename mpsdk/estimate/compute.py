"""FLOPs of each stage, and when each action would run if FLOPs were all that takes time.

Convention: that of `mpsdk.cost`. Model FLOPs are what the model asks for: three forwards, a backward being two. Hardware
FLOPs are what is done: with what is computed again and the padding of the vocabulary (the distinction of PaLM,
arXiv:2204.02311, appendix B). Attention counts as two products of whole matrices each way; a fused kernel that makes its
scores again in the backward, or leaves out the causal half, is not looked into.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mpsdk.cost import block_flops, dense_flops, head_flops, matrix_elements, output_flops
from mpsdk.estimate.account import Account
from mpsdk.plan import Plan
from mpsdk.schedule import Costs, Timeline, simulate


@dataclass(frozen=True)
class StageCompute:
    """FLOPs of one microbatch at one stage, on one tensor-parallel rank.

    `model`: forward and backward of what the model asks for. `linear` and `attention`: of the forward, as it is done,
    padding included; `linear_again` and `attention_again`: of what recompute does again before the backward.
    """

    stage: int
    model: float
    linear: float
    attention: float
    linear_again: float
    attention_again: float

    @property
    def forward(self) -> float:
        return self.linear + self.attention

    @property
    def again(self) -> float:
        return self.linear_again + self.attention_again

    @property
    def backward(self) -> float:
        return 2 * self.forward + self.again

    @property
    def hardware(self) -> float:
        return self.forward + self.backward


def stage_compute(account: Account, stage: int) -> StageCompute:
    """The FLOPs of `stage`."""
    plan, model = account.plan, account.plan.description
    length, kinds = plan.training.sequence_length, account.block_kinds(stage)
    share = plan.microbatch_size * length / plan.degrees.tp
    linear = sum(2.0 * matrix_elements(model.kinds[kind]) for kind in kinds)
    attention = sum(block_flops(model, kind, length) for kind in kinds) - linear
    again = [part * share for part in _again(account, linear, attention, blocks=len(kinds))]
    asked = linear + attention
    if account.is_last(stage):
        asked += head_flops(model, length)
        linear += output_flops(model) * plan.padded_vocab_size / (model.vocab_size or 1)
        repeated = 1 if plan.distribution.tensor_parallel.sequence_parallel else plan.degrees.tp
        linear += dense_flops(model, length) * repeated
    return StageCompute(stage, 3 * asked * share, linear * share, attention * share, *again)


def _again(account: Account, linear: float, attention: float, *, blocks: int) -> tuple[float, float]:
    """What recompute does again of the FLOPs `linear` and `attention` that the forward of `blocks` blocks takes."""
    recompute, spec = account.recompute, account.plan.description.spec
    if recompute.mode == "none":
        return 0.0, 0.0
    kept = recompute.keep if recompute.mode == "selective" else ()
    fused = account.attention == "fused"
    if "attention" in kept and account.attention == "weights":
        attention /= 2  # the weights, of two products the first
    # Attention that is no operation of its own is made of matrix products.
    if ("attention" in kept and fused) or ("matmul" in kept and account.attention == "math"):
        attention = 0.0
    if "matmul" in kept:
        linear = 0.0
    elif account.stops_before_product and spec is not None:
        linear -= blocks * 2.0 * spec.hidden_size * spec.feed_forward_size  # the down projection
    return linear, attention


def timeline_of(plan: Plan, stages: Sequence[StageCompute]) -> Timeline:
    """One pass over the microbatches as it should run: an action takes as long as it has FLOPs, messages nothing. A
    forward of the average stage takes 1."""
    unit = sum(stage.forward for stage in stages) / len(stages)
    return simulate(
        plan.schedule,
        Costs(
            forward=[stage.forward / unit for stage in stages],
            backward=[stage.backward / unit for stage in stages],
            # What is computed again, and all of attention's backward, is for the gradient of the input.
            backward_input=[(stage.linear + 2 * stage.attention + stage.again) / unit for stage in stages],
            backward_weight=[stage.linear / unit for stage in stages],
        ),
    )
