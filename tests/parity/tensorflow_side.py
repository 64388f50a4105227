"""What the process with TensorFlow does for a test. Importing this module imports no framework."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpsdk.backend import Place
from mpsdk.plan import Plan
from tests.cases import Outcome


def begin() -> None:
    """Once, before all else."""
    from tests.tf.ranks import make_devices

    make_devices()


def train(plan: Plan, steps: int) -> Outcome:
    """What rank 0 of a training from the plan's own initial weights saw."""
    from tests.tf import cases, ranks

    return ranks.run(plan.world_size, cases.train, plan, steps)[0]


def train_from_directory(plan: Plan, directory: str, steps: int) -> Outcome:
    """The same from the weights of a Hugging Face directory."""
    from tests.tf import cases, ranks

    return ranks.run(plan.world_size, cases.train_from_directory, plan, directory, steps)[0]


def logits(directory: str, ids: NDArray[np.int32]) -> NDArray[Any]:
    """Those of the Keras model that has the weights of a Hugging Face directory."""
    from mpsdk_tf import from_pretrained

    return np.asarray(from_pretrained(directory)(ids))


def gradients(
    directory: str, inputs: dict[str, NDArray[np.int32]], labels: NDArray[np.int32]
) -> tuple[NDArray[Any], float, dict[str, NDArray[Any]]]:
    """Of the Keras model that has the weights of a Hugging Face directory: logits, the sum of losses, and its gradients under
    canonical names."""
    import tensorflow as tf

    from mpsdk_tf import from_pretrained
    from mpsdk_tf.comm import TensorGroup
    from mpsdk_tf.loss import class_cross_entropy_sum, cross_entropy_sum
    from mpsdk_tf.transformer import named_parameters

    model = from_pretrained(directory)
    given = {name: tf.constant(values, tf.int32) for name, values in inputs.items()}
    named = dict(named_parameters(model))
    with tf.GradientTape() as tape:
        logits = model(given.pop("input_ids"), **given)
        if model.spec.head.classifies:
            loss = class_cross_entropy_sum(logits, tf.constant(labels), group=TensorGroup())
        else:
            loss = cross_entropy_sum(
                logits, tf.constant(labels), vocab_size=model.spec.vocab_size, group=TensorGroup()
            )
    found = tape.gradient(loss, [parameter.value for parameter in named.values()])
    return (
        np.asarray(logits),
        float(loss),
        {name: np.asarray(tf.convert_to_tensor(value)) for name, value in zip(named, found, strict=True)},
    )


def translated(
    family: str, theirs: dict[str, NDArray[Any]], config: dict[str, Any]
) -> tuple[dict[str, NDArray[Any]], dict[str, NDArray[Any]]]:
    """What `nn.huggingface` makes of transformers' state dict, and of that again, as TensorFlow's tensors."""
    import tensorflow as tf

    name = family.replace("_", "")
    module = importlib.import_module(f"mpsdk_tf.nn.huggingface.{name}")
    tensors = {key: tf.constant(values) for key, values in theirs.items()}
    ours = getattr(module, f"translate_hf_state_dict_to_smdistributed_{name}")(tensors, config=config)
    again = getattr(module, f"translate_state_dict_to_hf_{name}")(ours, config=config)
    first, second = ({key: values.numpy() for key, values in state.items()} for state in (ours, again))
    return first, second


def translations(family: str) -> list[str]:
    """The names of a family's functions in `nn.huggingface`."""
    module = importlib.import_module(f"mpsdk_tf.nn.huggingface.{family.replace('_', '')}")
    return sorted(key for key in vars(module) if key.startswith("translate"))


def pass_on(plan: Plan, source: str | None, unfinished: str) -> list[Any]:
    """`tests.passed_on.pass_on` of every rank."""
    from tests.tf import ranks

    return ranks.run(plan.world_size, _pass_on, plan, source, unfinished)


def _pass_on(place: Place, plan: Plan, source: str | None, unfinished: str) -> Any:
    from mpsdk_tf.backend import TensorFlowBackend
    from tests.passed_on import pass_on

    return pass_on(TensorFlowBackend(threads=True), place, plan, source, unfinished)
