"""Bytes on the wire against what the algorithms need at least, reckoned from the model's own numbers.

Where an estimate differs from the minimum, it is by a term that docs/estimate.md explains; each has a name here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from mpsdk.config import Distribution, Training
from mpsdk.estimate import Estimate
from mpsdk.families.describe import describe_spec
from mpsdk.families.read import read_model
from mpsdk.resolve import resolve

# Every size is a multiple of every degree, so that no share is padded.
WIDTH, BLOCKS, VOCABULARY, LENGTH, BATCH = 64, 4, 256, 32, 32
MODEL = {
    "model_type": "gpt2", "vocab_size": VOCABULARY, "n_positions": LENGTH, "n_embd": WIDTH, "n_layer": BLOCKS,
    "n_head": 8, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
}  # fmt: skip
FP32 = 4


@dataclass(frozen=True)
class Layout:
    """Degrees, microbatches of a step, level, and bytes of an activation."""

    pp: int = 1
    dp: int = 1
    sdp: int = 1
    tp: int = 1
    microbatches: int = 1
    level: str = "parameters"
    sequence_parallel: bool = True
    precision: str = "fp32"
    recompute: str = "none"

    @property
    def compute(self) -> int:
        return 4 if self.precision == "fp32" else 2

    @property
    def hidden(self) -> int:
        """Bytes of the hidden states of one microbatch: b s h c."""
        rows = BATCH // (self.dp * self.sdp * self.microbatches)
        return rows * LENGTH * WIDTH * self.compute

    def estimate(self) -> Estimate:
        distribution: dict[str, Any] = {
            "pipeline": {
                "degree": self.pp,
                "microbatches": self.microbatches,
                "partition": [BLOCKS // self.pp] * self.pp,
            },
            "sharded_data_parallel": {"degree": self.sdp, "level": self.level} if self.sdp > 1 else 1,
            "tensor_parallel": {"degree": self.tp, "sequence_parallel": self.sequence_parallel}
            if self.tp > 1
            else 1,
            "precision": self.precision,
            "activation_checkpointing": self.recompute,
        }
        plan = resolve(
            Distribution.parse(distribution),
            describe_spec(read_model(MODEL).spec),
            Training(global_batch=BATCH, sequence_length=LENGTH, tokenizer="bytes"),
            world_size=self.pp * self.dp * self.sdp * self.tp,
            framework="torch",
        )
        return plan.estimate()


LAYOUTS = [
    Layout(dp=2),
    Layout(dp=4, microbatches=2, precision="bf16"),
    Layout(sdp=2),
    Layout(sdp=4, microbatches=2),
    Layout(sdp=4, microbatches=4, precision="bf16", level="gradients"),
    Layout(sdp=4, microbatches=4, precision="bf16", level="optimizer"),
    Layout(dp=2, sdp=2, microbatches=2),
    Layout(tp=2),
    Layout(tp=4, sequence_parallel=False, microbatches=2),
    Layout(tp=2, recompute="full", precision="bf16"),
    Layout(tp=2, sequence_parallel=False, recompute="full"),
    Layout(pp=2, microbatches=4),
    Layout(pp=2, microbatches=4, sdp=2),
    Layout(pp=2, microbatches=4, tp=2, precision="bf16"),
    Layout(pp=2, microbatches=4, dp=2, sdp=2, tp=2, recompute="full"),
]


def elements(layout: Layout, pp: int) -> dict[str, list[tuple[int, int]]]:
    """Of each unit of the stage, what tensor parallelism cuts (already cut) and what it leaves whole."""
    h, t = WIDTH, layout.tp
    table = VOCABULARY * h // t
    block = ((12 * h * h + 7 * h) // t, 6 * h)  # four matrices of attention, two of 4h; biases; two norms
    blocks = [block] * (BLOCKS // layout.pp)
    if layout.pp == 1:  # the head's matrix is the embedding's
        return {"ends": [(table, LENGTH * h + 2 * h)], "blocks": blocks}
    if pp == 0:
        return {"embedding": [(table, LENGTH * h)], "blocks": blocks}
    return {"blocks": blocks, "head": [(table, 2 * h)]}


def minimum(layout: Layout, pp: int) -> dict[str, float]:
    """Bytes that a rank of pipeline coordinate `pp` must send in a step, by axis, with rings and Megatron's regions."""
    n, d, t, m = layout.sdp, layout.dp, layout.tp, layout.microbatches
    units = elements(layout, pp)
    whole = sum(cut + left for some in units.values() for cut, left in some)
    gathers, reduces = {"parameters": (2 * m, m), "gradients": (1, m), "optimizer": (1, 1)}[layout.level]
    ring = (t - 1) / t
    regions = 4 * (BLOCKS // layout.pp)  # all-reduces, or as much: two a block, forward and backward
    ends = {1: 2, 2: 1}[layout.pp]  # leaving the embedding, entering the head: one all-reduce each
    return {
        "dp": 2 * (d - 1) / d * FP32 * whole / n,
        "sdp": (n - 1) / n * whole * (gathers * layout.compute + reduces * FP32),
        "tp": 2 * ring * layout.hidden * m * (regions + ends),
        "pp": m * layout.hidden / (t if layout.sequence_parallel else 1) if layout.pp > 1 else 0,
    }


def explained(layout: Layout, pp: int) -> dict[str, float]:
    """What an estimate has beyond the minimum, or saves of it."""
    n, t, m = layout.sdp, layout.tp, layout.microbatches
    units = elements(layout, pp)
    ring, tokens = (t - 1) / t, layout.hidden // (WIDTH * layout.compute)
    part = (n - 1) / n * layout.compute
    last = layout.pp == 1 or pp == layout.pp - 1
    sharded = 0.0
    if layout.level == "parameters" and n > 1:
        # A lookup's gradient needs no weights.
        sharded -= sum(m * part * (cut + left) for cut, left in units.get("embedding", []))
        if last:  # the last block and the head stay whole until the backward that follows at once
            whole = [units["blocks"][-1], *units.get("head", []), *units.get("ends", [])]
            sharded -= sum(m * part * (cut + left) for cut, left in whole)
        if last and layout.pp > 1:  # the last unit, once more, for nobody
            sharded += sum(part * (cut + left) for cut, left in units["head"])
    tensor = 0.0
    if t > 1:
        blocks = BLOCKS // layout.pp
        if layout.recompute != "none":  # regions of the forward again, without leaving the last of a block
            again = 2 * blocks + blocks if layout.sequence_parallel else 2 * blocks
            tensor += ring * layout.hidden * m * again
        if last:  # the largest logit of each token; its sum and its label's logit
            tensor += 2 * ring * m * tokens * (FP32 + 2 * FP32)
        if layout.sequence_parallel:  # gradients of what is whole on every rank
            whole = sum(left for some in units.values() for _, left in some)
            tensor += 2 * ring * FP32 * whole / n
    tied = FP32 * VOCABULARY * WIDTH / t / n if layout.pp > 1 else 0.0  # an all-reduce of two sends it once
    return {"dp": 0.0, "sdp": sharded, "tp": tensor, "pp": tied}


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_bytes_are_the_minimum_but_for_what_is_explained(layout: Layout) -> None:
    estimate = layout.estimate()
    for pp in {0, layout.pp - 1}:
        messages = next(rank for rank in estimate.messages if rank.pp == pp)
        sent = {
            axis: sum(message.wire for message in messages.of_step() if message.axes == (axis,))
            for axis in ("dp", "sdp", "tp", "pp")
        }
        least, more = minimum(layout, pp), explained(layout, pp)
        assert sent == {axis: pytest.approx(least[axis] + more[axis], abs=1) for axis in sent}, pp


def test_beside_the_axes_a_step_sends_two_numbers() -> None:
    messages = Layout(dp=2, sdp=2, tp=2).estimate().messages[0]
    scalars = {message.purpose: message.bytes for message in messages.of_step() if len(message.axes) > 1}
    assert scalars == {"count of tokens": 8, "gradient norm": 4}
