"""The safetensors files of a Hugging Face directory, one or several with an index, as one mapping of stored tensors."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, cast

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from mpsdk.errors import CheckpointError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
# What weights may be stored as, by safetensors' names. numpy, and so safetensors, knows bfloat16 once ml_dtypes is imported.
DTYPES: Mapping[str, np.dtype[np.generic]] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}


class Slicer(Protocol):
    """What `safe_open(...).get_slice` gives: indexing it reads that much from the file."""

    def get_shape(self) -> list[int]: ...
    def get_dtype(self) -> str: ...
    def __getitem__(self, index: tuple[slice, ...]) -> NDArray[np.generic]: ...


@dataclass(frozen=True)
class Stored:
    """A tensor in a file. `dtype` is safetensors' name for it."""

    file: str
    shape: tuple[int, ...]
    dtype: str
    slicer: Slicer

    def read(self, index: tuple[slice, ...]) -> NDArray[np.float32]:
        """A slice of it; float16 and bfloat16 become float32 without loss."""
        return self.slicer[index].astype(np.float32, copy=False)


def has_weights(directory: Path) -> bool:
    """Whether the directory holds weights in any form, even one that can't be read."""
    return any(_weight_files(directory))


def stored_tensors(directory: Path) -> dict[str, Stored]:
    """Every tensor in the directory's safetensors files. Only headers are read.

    Raises:
        CheckpointError: no weights, weights in another form only, a shard that is missing or damaged, an index that does
            not fit its files.
    """
    weight_map: dict[str, str] = {}
    if (directory / SINGLE).is_file():
        files = [SINGLE]
    elif (directory / INDEX).is_file():
        weight_map = _weight_map(directory / INDEX)
        files = sorted(set(weight_map.values()))
    else:
        raise _no_safetensors(directory)

    found: dict[str, Stored] = {}
    wrong: list[str] = []
    for file in files:
        try:
            for name, stored in _open(directory, file):
                if name in found:
                    wrong.append(f"{name} is in {found[name].file} and in {file}")
                found[name] = stored
        except (OSError, SafetensorError) as error:
            wrong.append(f"{file} can't be read: {error}")
    if not wrong:
        missing = [name for name, file in weight_map.items() if name not in found or found[name].file != file]
        wrong += [f"{name} is not in {weight_map[name]}, where the index says it is" for name in missing]
    if wrong:
        raise CheckpointError(
            "\n".join([f"the weights in {directory} are damaged:", *(f"  {w}" for w in wrong)])
        )
    return found


def _open(directory: Path, file: str) -> Iterator[tuple[str, Stored]]:
    # Not closed here: the slicers hold the mapped file until the last of them goes.
    handle = safe_open(directory / file, framework="numpy")
    names = cast("list[str]", handle.keys())  # pyright: ignore[reportUnknownMemberType]
    for name in names:
        slicer = cast("Slicer", handle.get_slice(name))  # pyright: ignore[reportUnknownMemberType]
        yield name, Stored(file, tuple(slicer.get_shape()), slicer.get_dtype(), slicer)


def _weight_map(path: Path) -> dict[str, str]:
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        weight_map = {str(name): str(file) for name, file in index["weight_map"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is not an index of safetensors files: {error!r}") from error
    outside = sorted({file for file in weight_map.values() if Path(file).name != file})
    if outside or not weight_map:
        raise CheckpointError(f"{path} must name files beside it; it names {outside or 'none'}")
    return weight_map


def _weight_files(directory: Path) -> Iterator[Path]:
    for pattern in ("*.safetensors", INDEX, "*.bin", "*.bin.index.json", "*.h5", "*.msgpack", "*.ckpt.index"):
        yield from directory.glob(pattern)


def _no_safetensors(directory: Path) -> CheckpointError:
    others = sorted(path.name for path in _weight_files(directory))
    if not others:
        return CheckpointError(f"{directory} holds no weights; expected {SINGLE} or {INDEX}")
    return CheckpointError(
        f"{directory} holds its weights as {', '.join(others)}, which mpsdk does not open (pickled files can run code). "
        f"Convert a model that you trust once, with transformers: "
        f'AutoModelForCausalLM.from_pretrained("{directory}").save_pretrained("another directory")'
    )
