"""Writes a directory that `from_pretrained` of transformers' class for the model's head loads."""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal, cast

import numpy as np
from numpy.typing import NDArray

from mpsdk.backend import WEIGHT, TensorSource
from mpsdk.checkpoint.container import encode_header
from mpsdk.checkpoint.tiling import split
from mpsdk.errors import CheckpointError, ConfigError, Problem
from mpsdk.families.describe import describe_spec
from mpsdk.families.family import Family
from mpsdk.families.files import DTYPES as STORED_DTYPES
from mpsdk.families.files import INDEX, SINGLE
from mpsdk.families.layout import HfTensor, hf_tensors
from mpsdk.families.read import CONFIG
from mpsdk.families.registry import family_of
from mpsdk.families.spec import TransformerSpec

Dtype = Literal["float32", "bfloat16", "float16"]
DTYPES = {dtype.name: dtype for dtype in STORED_DTYPES.values()}
SAFETENSORS_NAMES = {dtype.name: name for name, dtype in STORED_DTYPES.items()}
READ_AT_ONCE = 4 << 20  # elements of a canonical tensor: 16 MiB, the chunks of a checkpoint
GIBIBYTE = 1 << 30
# Everything that a tokenizer or text generation may need, by the names that transformers gives these files.
CARRIED = (
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "merges.txt",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)
LABEL_NAMES = ("id2label", "label2id")
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
# Settings that no longer hold: older names for what is written here, where the model came from, code that came with it.
DROPPED = (
    "_name_or_path",
    "auto_map",
    "num_labels",
    "rope_scaling",
    "rope_theta",
    "torch_dtype",
    "transformers_version",
)


def export(
    source: TensorSource,
    spec: TransformerSpec,
    out_dir: str | Path,
    *,
    hf_config: Mapping[str, object] | None = None,
    tokenizer_dir: str | Path | None = None,
    dtype: Dtype = "float32",
    max_shard_bytes: int = 2 * GIBIBYTE,
) -> Path:
    """Write `spec`'s weights from `source` as a Hugging Face directory, complete or not at all.

    Memory: the largest tensor in `dtype`, and what `source` takes to read 16 MiB. A tied tensor is written once.

    Args:
        source: where the weights come from: a checkpoint, say.
        out_dir: the directory to make; it must not exist, or be empty.
        hf_config: the configuration that the model began with; what it says beyond the spec (token ids, say) is kept.
        tokenizer_dir: where to take tokenizer files and generation_config.json from.
        dtype: what to round the weights to.
        max_shard_bytes: above this, the weights go to several files with an index. A single tensor may exceed it.

    Returns:
        `out_dir`.

    Raises:
        ConfigError: `out_dir` is not empty, or the family can't express the spec.
        CheckpointError: `source` lacks a tensor, or a weight is too large for `dtype`.
    """
    family = family_of(spec.family)
    config = _config(family, spec, hf_config or {}, dtype)
    target = Path(out_dir)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        remedy = "already exists and is not empty; choose another directory, or remove this one"
        raise ConfigError([Problem("out_dir", str(target), remedy)], where="the export")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as scratch:
        draft = Path(scratch) / "model"
        draft.mkdir()
        _write_json(draft / CONFIG, config)
        _write_weights(
            source,
            hf_tensors(family.rules(spec.head.objective), describe_spec(spec)),
            draft,
            dtype,
            max_shard_bytes,
        )
        if tokenizer_dir is not None:
            _carry(Path(tokenizer_dir), draft)
        os.replace(draft, target)
    return target


def _carry(directory: Path, draft: Path) -> None:
    for name in CARRIED:
        if (directory / name).is_file():
            shutil.copyfile(directory / name, draft / name)


def _config(
    family: Family, spec: TransformerSpec, original: Mapping[str, object], dtype: Dtype
) -> dict[str, object]:
    dropped = {*DROPPED, *family.aliases}
    kept = {name: value for name, value in original.items() if name not in dropped}
    written = family.hf_config(spec)
    names = original.get("id2label")
    if isinstance(names, Mapping) and len(cast("Mapping[str, object]", names)) == spec.head.labels:
        written = {name: value for name, value in written.items() if name not in LABEL_NAMES}
    return dict.fromkeys(TOKEN_IDS) | kept | written | {"dtype": dtype}


def _write_weights(
    source: TensorSource, tensors: tuple[HfTensor, ...], directory: Path, dtype: Dtype, max_shard_bytes: int
) -> None:
    shards = list(_shards([tensor for tensor in tensors if not tensor.tied], dtype, max_shard_bytes))
    weight_map: dict[str, str] = {}
    parameters = 0
    for number, shard in enumerate(shards, start=1):
        file = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_shard(directory / file, shard, source, dtype)
        weight_map |= {tensor.name: file for tensor in shard}
        parameters += sum(math.prod(tensor.shape) for tensor in shard)
    total = parameters * DTYPES[dtype].itemsize
    if len(shards) > 1:
        metadata = {"total_parameters": parameters, "total_size": total}
        _write_json(directory / INDEX, {"metadata": metadata, "weight_map": weight_map})


def _write_shard(path: Path, shard: list[HfTensor], source: TensorSource, dtype: Dtype) -> None:
    """One file, tensor after tensor; the safetensors library would want all of them at once."""
    header = encode_header(
        {tensor.name: tensor.shape for tensor in shard},
        {"format": "pt"},
        dtype=SAFETENSORS_NAMES[dtype],
        item_bytes=DTYPES[dtype].itemsize,
    )
    with path.open("wb") as file:
        file.write(header)
        for tensor in shard:
            file.write(_gather(source, tensor, dtype).reshape(-1).view(np.uint8).data)


def _shards(tensors: list[HfTensor], dtype: Dtype, max_shard_bytes: int) -> Iterator[list[HfTensor]]:
    """The tensors in order, cut where the next one would no longer fit."""
    shard: list[HfTensor] = []
    held = 0
    for tensor in tensors:
        size = int(np.prod(tensor.shape)) * DTYPES[dtype].itemsize
        if shard and held + size > max_shard_bytes:
            yield shard
            shard, held = [], 0
        shard.append(tensor)
        held += size
    yield shard


def _gather(source: TensorSource, tensor: HfTensor, dtype: Dtype) -> NDArray[np.generic]:
    """One Hugging Face tensor from its canonical parts, rounded to `dtype` (to nearest, ties to even)."""
    values = np.empty(tensor.shape, dtype=DTYPES[dtype])
    for part in tensor.parts:
        for offset, shape in split(part.shape, READ_AT_ONCE):
            piece = source.read(part.name, WEIGHT, offset, shape)
            with np.errstate(over="ignore"):
                rounded = piece.astype(DTYPES[dtype], copy=False)
            if rounded is not piece and not np.isfinite(rounded[np.isfinite(piece)]).all():
                raise CheckpointError(
                    f"{part.name} has values too large for {dtype}; export as bfloat16 or float32"
                )
            for there, here in tensor.pieces(part, offset, shape):
                values[there] = tensor.turn(rounded[here])
    return values


def _write_json(path: Path, content: Mapping[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
