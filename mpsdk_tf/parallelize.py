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
from mpsdk_tf.loss import class_cross_entropy_sum, cross_entropy_sum, own_labels
from mpsdk_tf.parameters import Held
from mpsdk_tf.precision import COMPUTE_DTYPES, layers_of
from mpsdk_tf.reach import pooled_index
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
    if spec.drops:
        return training, _parts(plan, model, unit_of, groups, feed, training=False)
    if spec.head.classifies and model.head is not None:  # which counts its confusions in evaluation
        return training, [*training[:-1], _head_part(plan, model, unit_of, groups, feed, training=False)]
    return training, training


def _parts(
    plan: Plan, model: Transformer, unit_of: dict[str, int], groups: Groups, feed: Feed, *, training: bool
) -> list[Part]:
    """The pieces of `model` in order. Blocks share a piece, whose weights are its arguments, with those of their window."""
    spec, arrays = model.spec, plan.batch_shapes
    compiled, split = compiles_pieces(plan), plan.schedule.splits_backward
    turns = model.head is not None and plan.schedule.turns_at_once
    parts: list[Part] = []
    if model.embedding is not None:
        taken = [name for name in ("token_type_ids",) if name in arrays]
        sites = model.embedding.sites if training and spec.dropout.embedding > 0 else ()
        names, call = _call(model.embedding, "embedding.", taken, seeded=bool(sites), training=training)
        piece = Piece("embedding", call, compiled=compiled)
        stays = model.tied_here and turns
        parts.append(Part(piece, unit_of[names[0]], names, feed.of(taken, sites), stays=stays))
    dropped = training and (spec.dropout.attention > 0 or spec.dropout.residual > 0)
    taken = [name for name in ("attention_mask",) if name in arrays]
    recompute = plan.distribution.activation_checkpointing
    pieces: dict[int | None, tuple[tuple[str, ...], Piece]] = {}
    for number, block in model.blocks.items():
        if block.window not in pieces:
            relative, call = _call(block, "", taken, seeded=dropped, training=training)
            name = "block" if block.window is None else f"block with window {block.window}"
            piece = Piece(name, call, keep=keep_of(recompute), compiled=compiled, split=split)
            pieces[block.window] = relative, piece
        relative, piece = pieces[block.window]
        names = tuple(f"blocks.{number}.{name}" for name in relative)
        extras = feed.of(taken, block.sites if dropped else ())
        stays = turns and block is list(model.blocks.values())[-1]
        parts.append(Part(piece, unit_of[names[0]], names, extras, stays=stays, offloads=recompute.offload))
    if model.head is not None:
        parts.append(_head_part(plan, model, unit_of, groups, feed, training=training))
    return parts


def _head_part(
    plan: Plan, model: Transformer, unit_of: dict[str, int], groups: Groups, feed: Feed, *, training: bool
) -> Part:
    """The head and the loss after it."""
    assert model.head is not None
    sites = model.head.sites if training and model.spec.head.dropout > 0 else ()
    taken = [name for name in ("labels", "attention_mask") if name in plan.batch_shapes]
    names, call = _loss_call(plan, model, groups, taken, seeded=bool(sites), training=training)
    piece = Piece("head", call, compiled=compiles_pieces(plan), split=plan.schedule.splits_backward)
    stays = plan.schedule.turns_at_once
    return Part(piece, unit_of[names[0]], names, feed.of(taken, sites), stays=stays)


def _call(
    layer: keras.layers.Layer, prefix: str, arrays: Sequence[str], *, seeded: bool, training: bool
) -> tuple[tuple[str, ...], Call]:
    """The names of the weights of `layer`, and the layer as a function of them, its input, its seeds and `arrays`."""
    named = dict(named_parameters(layer, prefix))
    known = ("seeds", *arrays) if seeded else tuple(arrays)

    def call(parameters: list[Tensor], hidden: Tensor, extras: list[Tensor]) -> Tensor:
        with _weights(named, parameters):
            return layer(hidden, **dict(zip(known, extras, strict=True)), training=training)

    return tuple(named), call


def _loss_call(
    plan: Plan, model: Transformer, groups: Groups, arrays: Sequence[str], *, seeded: bool, training: bool
) -> tuple[tuple[str, ...], Call]:
    """The head and the loss after it, as a function of weights, hidden states, seeds and `arrays`."""
    head, spec, length = model.head, model.spec, plan.training.sequence_length
    assert head is not None
    named = dict(named_parameters(head, "head."))
    names = tuple(named)
    if model.tied_here:
        names = (*names, "embedding.tokens.weight")
    known = ("seeds", *arrays) if seeded else tuple(arrays)

    def call(parameters: list[Tensor], hidden: Tensor, extras: list[Tensor]) -> Tensor:
        given = dict(zip(known, extras, strict=True))
        labels, pooled = given["labels"], None
        if spec.head.objective == "sequence-classification":
            pooled = pooled_index(spec, given.get("attention_mask"), length, plan.microbatch_size)
        with _weights(named, parameters[: len(named)]):
            tied = parameters[-1] if model.tied_here else None
            seed = given["seeds"][0] if seeded else None
            logits = head(hidden, tied, seed, pooled, training=training)
        if not spec.head.classifies:
            return cross_entropy_sum(logits, labels, vocab_size=spec.vocab_size, group=groups.tensor)
        labels = own_labels(labels, pooled, length=length, group=groups.tensor)
        return class_cross_entropy_sum(logits, labels, group=groups.tensor, with_confusion=not training)

    return names, call


def _weights(named: dict[str, keras.Variable], values: Sequence[Tensor]) -> keras.StatelessScope:
    mapping = list(zip(named.values(), values, strict=True))
    return keras.StatelessScope(state_mapping=mapping, initialize_variables=False)
