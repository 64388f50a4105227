"""The whole story of making one stage parallel, in its order."""

from __future__ import annotations

from collections.abc import Sequence

import keras
import tensorflow as tf

from mpsdk.plan import Plan
from mpsdk_tf.compiled import compile_islands, compiles_pieces, is_compiled
from mpsdk_tf.graph import Call, Piece
from mpsdk_tf.keras_model import KerasModel
from mpsdk_tf.keras_parts import keras_parts
from mpsdk_tf.loss import cross_entropy_sum
from mpsdk_tf.parameters import Held
from mpsdk_tf.precision import COMPUTE_DTYPES, layers_of
from mpsdk_tf.recompute import keep_of
from mpsdk_tf.sharded import Unit
from mpsdk_tf.stage import Feed, Part, Stage
from mpsdk_tf.tensor import Tensor
from mpsdk_tf.topology import Groups
from mpsdk_tf.transformer import Transformer, named_parameters


def parallelize(
    plan: Plan,
    stage: int,
    held: Sequence[Held],
    groups: Groups,
    feed: Feed,
    made: KerasModel | None = None,
) -> Stage:
    """Stage number `stage` on this rank, cut, recomputing, compiled, and sharded.

    `made`: a user's own model; None: the plan's Transformer.
    """
    by_name = {item.name: item for item in held}
    planned = plan.units(stage, groups.coordinates.tp)
    units = [Unit([by_name[tensor.name] for tensor in unit], plan, groups) for unit in planned]
    unit_of = {tensor.name: number for number, unit in enumerate(planned) for tensor in unit}
    if made is None:
        training, quiet = _transformer_parts(plan, stage, unit_of, groups, feed)
    else:
        training, quiet = (
            keras_parts(plan, made, stage, unit_of, groups, feed, training=each) for each in (True, False)
        )
    travelling = _travelling(plan, groups, made)
    sharded = plan.distribution.sharded_data_parallel
    return Stage(
        training,
        quiet,
        units,
        takes=travelling[stage - 1] if stage > 0 else None,
        gives=travelling[stage] if stage < len(plan.stages) - 1 else None,
        lets_go=plan.degrees.sdp > 1 and sharded.level == "parameters",
        prefetch=sharded.prefetch,
        device=groups.device,
    )


def _travelling(plan: Plan, groups: Groups, made: KerasModel | None) -> list[tf.TensorSpec]:
    """What each stage but the last passes on."""
    length, tensor = plan.training.sequence_length, groups.tensor
    if made is not None:
        return made.travelling(plan)
    assert plan.description.spec is not None
    part = length // (tensor.size if tensor.sequence_parallel else 1)
    shape = (plan.microbatch_size, part, plan.description.spec.hidden_size)
    return [tf.TensorSpec(shape, COMPUTE_DTYPES[plan.distribution.precision.mode])] * (len(plan.stages) - 1)


def _transformer_parts(
    plan: Plan, stage: int, unit_of: dict[str, int], groups: Groups, feed: Feed
) -> tuple[list[Part], list[Part]]:
    """For training, and without dropout for evaluation."""
    spec = plan.description.spec
    assert spec is not None
    with layers_of(COMPUTE_DTYPES[plan.distribution.precision.mode]):
        model = Transformer(  # tensor parallelism: the layers make themselves at this rank's size
            spec,
            vocab_rows=plan.padded_vocab_size,
            blocks=plan.stages[stage],
            first=stage == 0,
            last=stage == len(plan.stages) - 1,
            group=groups.tensor,
        )
    if is_compiled(plan) and not compiles_pieces(plan):
        compile_islands(model)
    training = _parts(plan, model, unit_of, groups, feed, training=True)
    if not spec.dropout.any:
        return training, training
    return training, _parts(plan, model, unit_of, groups, feed, training=False)


def _parts(
    plan: Plan, model: Transformer, unit_of: dict[str, int], groups: Groups, feed: Feed, *, training: bool
) -> list[Part]:
    """The pieces of `model` in order. Blocks share one piece, whose weights are its arguments."""
    spec = model.spec
    compiled, split = compiles_pieces(plan), plan.schedule.splits_backward
    turns = model.head is not None and plan.schedule.turns_at_once
    parts: list[Part] = []
    if model.embedding is not None:
        names, call = _call(model.embedding, "embedding.", training=training)
        dropped = training and spec.dropout.embedding > 0
        extras = feed.seeds_of(model.embedding.sites) if dropped else _nothing
        piece = Piece("embedding", call, compiled=compiled)
        parts.append(Part(piece, unit_of[names[0]], names, extras, stays=model.tied_here and turns))
    first = next(iter(model.blocks.values()))
    relative, call = _call(first, "", training=training)
    recompute = plan.distribution.activation_checkpointing
    piece = Piece("block", call, keep=keep_of(recompute), compiled=compiled, split=split)
    dropped = training and (spec.dropout.attention > 0 or spec.dropout.residual > 0)
    for number, block in model.blocks.items():
        names = tuple(f"blocks.{number}.{name}" for name in relative)
        extras = feed.seeds_of(block.sites) if dropped else _nothing
        stays = turns and block is list(model.blocks.values())[-1]
        parts.append(Part(piece, unit_of[names[0]], names, extras, stays=stays, offloads=recompute.offload))
    if model.head is not None:
        names, call = _loss_call(plan, model, groups)
        piece = Piece("head", call, compiled=compiled, split=split)
        parts.append(Part(piece, unit_of[names[0]], names, feed.labels_of, stays=turns))
    return parts


def _nothing(microbatch: int) -> list[Tensor]:
    return []


def _call(layer: keras.layers.Layer, prefix: str, *, training: bool) -> tuple[tuple[str, ...], Call]:
    """The names of the weights of `layer`, and the layer as a function of them, its input, and its seeds."""
    named = dict(named_parameters(layer, prefix))

    def call(parameters: list[Tensor], hidden: Tensor, extras: list[Tensor]) -> Tensor:
        with _weights(named, parameters):
            return layer(hidden, extras[0] if extras else None, training=training)

    return tuple(named), call


def _loss_call(plan: Plan, model: Transformer, groups: Groups) -> tuple[tuple[str, ...], Call]:
    """The head and the loss after it, as a function of weights, hidden states and labels."""
    head, vocab_size = model.head, plan.description.vocab_size
    assert head is not None and vocab_size is not None
    named = dict(named_parameters(head, "head."))
    names = tuple(named)
    if model.tied_here:
        names = (*names, "embedding.tokens.weight")

    def call(parameters: list[Tensor], hidden: Tensor, extras: list[Tensor]) -> Tensor:
        with _weights(named, parameters[: len(named)]):
            logits = head(hidden, parameters[-1] if model.tied_here else None)
        return cross_entropy_sum(logits, extras[0], vocab_size=vocab_size, group=groups.tensor)

    return names, call


def _weights(named: dict[str, keras.Variable], values: Sequence[Tensor]) -> keras.StatelessScope:
    mapping = list(zip(named.values(), values, strict=True))
    return keras.StatelessScope(state_mapping=mapping, initialize_variables=False)
