"""What this backend can't do, as data. Imports no framework, so that a plan can be refused without one."""

from __future__ import annotations

from collections.abc import Iterator

from mpsdk.config import Distribution, Training
from mpsdk.description import ModelDescription
from mpsdk.errors import Problem


def limits(distribution: Distribution, training: Training, description: ModelDescription) -> list[Problem]:
    """Everything in the request that the TensorFlow backend has no implementation for."""
    problems = list(_compile_limits(distribution))
    if description.spec is None:
        problems += _own_model_limits(distribution, description)
    return problems


def _own_model_limits(distribution: Distribution, description: ModelDescription) -> Iterator[Problem]:
    """What can't be had of a user's own Keras model."""
    tensor, stages = distribution.tensor_parallel.degree, distribution.pipeline.degree
    if tensor > 1:
        yield from _tensor_parallel_limits(distribution, description)
    if stages > 1 and len(description.blocks) == 1:
        remedy = (
            f"{description.name} can't be cut into stages: only a Sequential or functional model can, at tensors that alone "
            "lead from one part to the next, where no mask passes and no weight is used on both sides"
        )
        yield Problem("pipeline.degree", stages, remedy)
    if distribution.activation_checkpointing.mode == "selective":
        remedy = 'keeps results that only the layers of the model families name; set mode to "full" or "none"'
        yield Problem("activation_checkpointing.mode", "selective", remedy)


def _tensor_parallel_limits(distribution: Distribution, description: ModelDescription) -> Iterator[Problem]:
    section = distribution.tensor_parallel
    yield from (Problem(*refused) for refused in description.uncut)
    if not description.uncut and not any(tensor.role == "part" for tensor in description.tensors()):
        remedy = (
            f"no layer of {description.name} has a parallel twin and is to be cut; Dense, EinsumDense, Embedding, "
            "ReversibleEmbedding and MultiHeadAttention have one, and mpsdk_tf.tp_register gives a layer of your own one"
        )
        yield Problem("tensor_parallel.degree", section.degree, remedy)
    if "sequence_parallel" in section.model_fields_set and section.sequence_parallel:
        remedy = "a model of your own has the whole sequence on every tensor-parallel rank; leave it out"
        yield Problem("tensor_parallel.sequence_parallel", True, remedy)
    if distribution.compile.enabled:
        remedy = "XLA has no collectives, and the layers of a model of your own communicate; set it to false"
        yield Problem("compile", distribution.compile.enabled, remedy)


def _compile_limits(distribution: Distribution) -> Iterator[Problem]:
    enabled, recompute = distribution.compile.enabled, distribution.activation_checkpointing
    if enabled == "auto":
        remedy = "the TensorFlow backend does not measure yet whether compiling pays; write true or false"
        yield Problem("compile", enabled, remedy)
    if enabled and recompute.mode == "selective" and distribution.tensor_parallel.degree > 1:
        # Between two collectives all is one program of XLA, which keeps what it likes.
        remedy = 'can\'t be compiled together with tensor_parallel; set mode to "full" or "none", or compile: false'
        yield Problem("activation_checkpointing.mode", recompute.mode, remedy)
