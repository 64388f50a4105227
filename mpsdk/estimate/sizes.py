"""The sizes of one microbatch as one tensor-parallel rank sees it."""

from __future__ import annotations

from dataclasses import dataclass

from mpsdk.plan import Plan

COMPUTE_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
FP32 = 4
INDEX = 8  # token ids and labels are int64 on the device


@dataclass(frozen=True)
class Sizes:
    """Numbers of elements, after every cut by tensor parallelism; `compute` is the bytes of an activation's element.

    `tokens` is microbatch size · sequence length; `part` is what of it a rank has between the tensor-parallel regions:
    tokens / t under sequence parallelism, else all.
    """

    compute: int
    microbatch_size: int
    length: int
    tokens: int
    part: int
    width: int
    heads: int
    queries: int  # heads · head size
    pairs: int  # key-value heads · head size
    head_size: int
    features: int
    vocabulary: int  # columns of the logits: rows of the padded vocabulary, or a classifier's classes
    tensor_parallel: int
    sequence_parallel: bool

    @property
    def hidden(self) -> int:
        """Bytes of hidden states between the tensor-parallel regions; what travels between stages."""
        return self.part * self.width * self.compute

    @property
    def whole_hidden(self) -> int:
        """Bytes of hidden states of all tokens, as the tensor-parallel regions take them in."""
        return self.tokens * self.width * self.compute


def sizes_of(plan: Plan) -> Sizes | None:
    """The sizes under `plan`, at tensor-parallel coordinate 0 (which has no padding rows of the vocabulary before the
    others have). None for a model that is described by its tensors only."""
    spec, t = plan.description.spec, plan.degrees.tp
    if spec is None:
        return None
    length = plan.training.sequence_length
    tokens = plan.microbatch_size * length
    sequence_parallel = t > 1 and plan.distribution.tensor_parallel.sequence_parallel
    rows = spec.head.labels if spec.head.classifies else plan.padded_vocab_size // t
    return Sizes(
        compute=COMPUTE_BYTES[plan.distribution.precision.mode],
        microbatch_size=plan.microbatch_size,
        length=length,
        tokens=tokens,
        part=tokens // t if sequence_parallel else tokens,
        width=spec.hidden_size,
        heads=spec.heads // t,
        queries=spec.heads * spec.head_size // t,
        pairs=spec.key_value_heads * spec.head_size // t,
        head_size=spec.head_size,
        features=spec.feed_forward_size // t,
        vocabulary=rows,
        tensor_parallel=t,
        sequence_parallel=sequence_parallel,
    )
