"""What a stage does beside its matrix products: bytes that memory-bound operations read and write, and operations to launch.

Counted as our layers run them, one operation after another, each reading its operands and writing its result once.
"""

from __future__ import annotations

from dataclasses import dataclass

from mpsdk.estimate.account import Account
from mpsdk.estimate.sizes import FP32, Sizes
from mpsdk.estimate.states import Unit
from mpsdk.families.spec import TransformerSpec


@dataclass(frozen=True)
class Work:
    """`bytes` read and written, in `kernels` operations."""

    bytes: float = 0.0
    kernels: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(self.bytes + other.bytes, self.kernels + other.kernels)

    def __mul__(self, times: float) -> Work:
        return Work(self.bytes * times, round(self.kernels * times))


@dataclass(frozen=True)
class StageWork:
    """Of one microbatch: its forward, what recompute does again, the gradients of its input, those of weights."""

    forward: Work
    again: Work
    backward_input: Work
    backward_weight: Work


def stage_work(account: Account, stage: int) -> StageWork:
    """The memory-bound work of `stage`; without a spec, only that of its gradients."""
    spec, sizes, blocks = account.plan.description.spec, account.sizes, account.blocks(stage)
    forward = again = backward = Work()
    if spec is not None and sizes is not None:
        inside = _block_forward(spec, sizes, account)
        forward, backward = inside * blocks, _block_backward(spec, sizes) * blocks
        if account.recompute.mode != "none":
            again = forward
        if account.is_first(stage):
            forward += Work((5 if spec.positions == "learned" else 2) * sizes.hidden, 3)
            backward += Work(3 * sizes.hidden, 2)
        if account.is_last(stage):
            logits = sizes.tokens * sizes.vocabulary
            cast = sizes.compute + FP32 if sizes.compute != FP32 else 0
            # The loss: largest, difference, exponential and sum of the logits; later one product.
            forward += Work(2 * sizes.hidden + logits * (6 * FP32 + cast), 16)
            backward += Work(3 * sizes.hidden + logits * (2 * FP32 + cast), 8)
    weights = sum((_gradients(account, unit) for unit in account.units[stage]), Work())
    return StageWork(forward, again, backward, weights)


def _block_forward(spec: TransformerSpec, sizes: Sizes, account: Account) -> Work:
    hidden, inner = sizes.hidden, sizes.tokens * sizes.features * sizes.compute
    queries, pairs = (sizes.tokens * count * sizes.compute for count in (sizes.queries, sizes.pairs))
    composed = spec.norm == "rmsnorm" and not account.kernels.fused_rms_norm
    norm = Work(10 * hidden, 6) if composed else Work(2 * hidden, 1)
    work = norm * 2 + Work(3 * hidden, 1) * 2  # two norms, two residual sums
    work += Work(2 * queries, 1)  # the mixed values, turned
    work += Work(2 * inner, 1) + (Work(3 * inner, 1) if spec.gated else Work())  # activation, gate
    if spec.positions == "rotary":  # products with cosines and sines, a turned copy, a sum
        work += Work(10 * (queries + pairs), 10)
    if spec.dropout.residual:
        work += Work(2.25 * hidden, 1) * 2
    if sizes.sequence_parallel:  # gathered parts into one sequence, and back
        work += Work(2 * sizes.whole_hidden, 2) * 2
    products = 7 if spec.gated else 6
    return work + Work(0.0, products + 1)


def _block_backward(spec: TransformerSpec, sizes: Sizes) -> Work:
    hidden, inner = sizes.hidden, sizes.tokens * sizes.features * sizes.compute
    queries, pairs = (sizes.tokens * count * sizes.compute for count in (sizes.queries, sizes.pairs))
    work = Work(3 * hidden, 2) * 2 + Work(3 * hidden, 1) * 2  # two norms, two sums of branches
    work += Work(6 * hidden, 2)  # gradients of query, key and value into one
    work += Work(2 * queries, 1)
    work += Work(3 * inner, 1) + (Work(5 * inner, 2) + Work(3 * hidden, 1) if spec.gated else Work())
    if spec.positions == "rotary":
        work += Work(10 * (queries + pairs), 12)
    if spec.dropout.residual:
        work += Work(2.25 * hidden, 1) * 2
    if sizes.sequence_parallel:
        work += Work(2 * sizes.whole_hidden, 2) * 2
    products = 7 if spec.gated else 6
    return work + Work(0.0, 2 * products + 1)


def _gradients(account: Account, unit: Unit) -> Work:
    """Gradients of weights into the sums of earlier backwards; the embedding's are first set to zero as a whole."""
    bytes_each = FP32 * (3 if account.backwards > 1 else 0)
    if unit.kind in ("embedding", "embedding and head"):
        bytes_each += FP32
    return Work(float(bytes_each * unit.elements), len(unit.shapes))


def gather_work(account: Account, unit: Unit) -> Work:
    """Copies that gathering one unit makes beside the collective."""
    return (
        Work(2.0 * account.compute * unit.padded(account.degree), len(unit.shapes))
        if account.copies
        else Work()
    )


def reduce_work(account: Account, unit: Unit) -> Work:
    """Copies that reducing one unit's gradients makes: into one fp32 buffer."""
    each = account.compute + FP32
    return Work(float(each * unit.padded(account.degree)), len(unit.shapes)) if account.copies else Work()
