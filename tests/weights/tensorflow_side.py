"""The states after the last block that a rank finds in TensorFlow. Importing this module imports no framework."""

from __future__ import annotations

from collections import defaultdict
from queue import SimpleQueue
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpsdk.backend import WEIGHT, Batch, Place
from mpsdk.families import read_model
from mpsdk.families.hf import HuggingFaceSource
from mpsdk.plan import Plan

_passed: defaultdict[tuple[str | None, int], SimpleQueue[Any]] = defaultdict(SimpleQueue)
"""What a stage passes on to the next, whose rank is another thread."""


def hidden_states(plan: Plan, directory: str, batch: Batch) -> list[NDArray[Any] | None]:
    """Of each rank: (rows, length, width) on the last stage, None on others."""
    from tests.tf import ranks

    return ranks.run(plan.world_size, _of_rank, plan, directory, batch)


def _of_rank(place: Place, plan: Plan, directory: str, batch: Batch) -> NDArray[Any] | None:
    import tensorflow as tf

    from mpsdk_tf.topology import join, make_groups
    from mpsdk_tf.transformer import Transformer, named_parameters

    spec = plan.description.spec
    assert spec is not None
    groups = make_groups(plan, place, join(place, threads=True).device)
    (stage,) = plan.stages_of(place.rank)
    last = stage == len(plan.stages) - 1
    read = read_model(directory, objective=spec.head.objective)
    source = HuggingFaceSource(directory, read.family, spec)
    with tf.device(groups.device):
        model = Transformer(
            spec,
            vocab_rows=plan.padded_vocab_size,
            blocks=plan.stages[stage],
            first=stage == 0,
            last=False,
            group=groups.tensor,
        )
        variables = dict(named_parameters(model))
        for planned in plan.stage_tensors(stage, groups.coordinates.tp):
            if planned.name in variables:
                offset, shape = planned.canonical_slice(0, planned.shape[0])
                values = np.zeros(planned.shape, np.float32)
                values[tuple(map(slice, shape))] = source.read(planned.name, WEIGHT, offset, shape)
                variables[planned.name].assign(values)

        @tf.function(autograph=False)
        def forward(inputs: Any, mask: Any) -> Any:
            return model(inputs, attention_mask=mask)

        key = (place.store, groups.coordinates.tp)
        entering = batch["input_ids"] if stage == 0 else _passed[key].get()
        found = forward(tf.constant(entering), tf.constant(batch["attention_mask"])).numpy()
    if last:
        return found
    _passed[key].put(found)
    return None
