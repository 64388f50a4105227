"""What the parts of a model cost: FLOPs and parameters of a block, of the embedding and of the head.

Convention for FLOPs: a multiply-add is two; a matrix product of every linear layer, and attention over the whole
sequence without the causal half (the convention of PaLM, arXiv:2204.02311, appendix B). A backward pass costs twice
its forward.
"""

from __future__ import annotations

from collections.abc import Iterable

from mpsdk.description import ModelDescription, TensorDescription
from mpsdk.partition import Cost

STATE_BYTES_PER_PARAMETER = 16  # fp32 weight, gradient, two AdamW moments


def matrix_elements(tensors: Iterable[TensorDescription]) -> int:
    """Elements of the matrices that multiply activations (not of an embedding, which is looked up)."""
    return sum(
        t.elements for t in tensors if (len(t.shape) == 2 and t.role in ("column", "row")) or _may_multiply(t)
    )


def _may_multiply(tensor: TensorDescription) -> bool:
    """Whether a tensor of a user's own model, of which nothing else is known, is taken to multiply activations."""
    return tensor.initial.kind == "given" and len(tensor.shape) > 1 and tensor.part != "embedding"


def block_flops(model: ModelDescription, kind: str, sequence_length: int) -> float:
    """Forward FLOPs of one token in one block of `kind`."""
    linear = 2.0 * matrix_elements(model.kinds[kind])
    spec = model.spec
    attention = 4.0 * sequence_length * spec.heads * spec.head_size if spec is not None else 0.0
    return linear + attention


def output_flops(model: ModelDescription) -> float:
    """Forward FLOPs of one token in the output projection over the vocabulary."""
    return 2.0 * sum(
        t.elements for t in model.head if (t.role == "vocab" and len(t.shape) > 1) or _may_multiply(t)
    )


def dense_flops(model: ModelDescription, sequence_length: int) -> float:
    """Forward FLOPs of one token in the layers of the head that tensor parallelism leaves whole: those before an output
    projection, and a classifier's, of which one of sequences reads one token of each."""
    if model.spec is None:
        return 0.0
    elements = sum(t.elements for t in model.head if t.role == "replicated" and len(t.shape) > 1)
    tokens = sequence_length if model.spec.head.objective == "sequence-classification" else 1
    return 2.0 * elements / tokens


def head_flops(model: ModelDescription, sequence_length: int) -> float:
    """Forward FLOPs of one token in the head."""
    return output_flops(model) + dense_flops(model, sequence_length)


def forward_flops(model: ModelDescription, sequence_length: int) -> float:
    """Forward FLOPs of one token in the whole model."""
    of_kind = {kind: block_flops(model, kind, sequence_length) for kind in model.kinds}
    return sum(of_kind[kind] for kind in model.blocks) + head_flops(model, sequence_length)


def partition_costs(model: ModelDescription, sequence_length: int) -> tuple[list[Cost], Cost, Cost]:
    """Costs of each block, of the embedding part and of the head part, for balancing stages.

    Compute in FLOPs a token; memory in bytes of training state (activations are the same share of every stage's
    blocks, so they don't move the balance).
    """

    def state(tensors: Iterable[TensorDescription]) -> float:
        return float(STATE_BYTES_PER_PARAMETER * sum(t.elements for t in tensors))

    of_kind = {
        kind: Cost(compute=block_flops(model, kind, sequence_length), memory=state(tensors))
        for kind, tensors in model.kinds.items()
    }
    blocks = [of_kind[kind] for kind in model.blocks]
    return (
        blocks,
        Cost(compute=0.0, memory=state(model.embedding)),
        Cost(compute=head_flops(model, sequence_length), memory=state(model.head)),
    )
