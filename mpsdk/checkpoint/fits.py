"""Whether a checkpoint's weights are those of a model, by names and shapes alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from mpsdk.description import ModelDescription


def tensor_differences(found: Mapping[str, tuple[int, ...]], description: ModelDescription) -> Iterator[str]:
    """Every weight that is missing, left over or of another shape; `found` as `Checkpoint.shapes` gives it."""
    wanted = {tensor.name: tensor.shape for tensor in description.tensors() if tensor.tied_to is None}
    for name in sorted(wanted.keys() - found.keys()):
        yield f"{name} {list(wanted[name])} is missing"
    for name in sorted(found.keys() - wanted.keys()):
        yield f"{name} {list(found[name])} is no tensor of the model"
    for name in sorted(wanted.keys() & found.keys()):
        if found[name] != wanted[name]:
            yield f"{name} has shape {list(found[name])}, and the model's has {list(wanted[name])}"
