"""Between checkpoints and Hugging Face directories, in both directions, piece by piece and without a framework.

A converted checkpoint holds weights alone, at step 0: a run that resumes from it starts its optimizer and its data afresh.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import uuid
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeVar, cast

from pydantic import JsonValue, ValidationError

from mpsdk.backend import WEIGHT, RankState, Shard
from mpsdk.checkpoint.commit import commit
from mpsdk.checkpoint.fits import tensor_differences
from mpsdk.checkpoint.manifest import ITEM_BYTES, canonical_json, validation_problems
from mpsdk.checkpoint.names import TEMPORARY, find
from mpsdk.checkpoint.problems import os_errors, refuse
from mpsdk.checkpoint.reader import Checkpoint
from mpsdk.checkpoint.storage import MANIFEST_FILE, Location, is_remote, locate
from mpsdk.checkpoint.tiling import split
from mpsdk.checkpoint.writer import CHUNK_BYTES, write_rank
from mpsdk.errors import CheckpointError, ConfigError, MpsdkError, Problem

if TYPE_CHECKING:
    from mpsdk.description import ModelDescription
    from mpsdk.families.export import Dtype
    from mpsdk.families.read import ReadModel
    from mpsdk.families.source import HuggingFaceSource
    from mpsdk.families.spec import Objective, TransformerSpec

logger = logging.getLogger(__name__)
T = TypeVar("T")

WRITER = "huggingface"  # what a converted manifest names in place of a framework


class Export(NamedTuple):
    """What a Hugging Face directory is made of beside the weights."""

    spec: TransformerSpec
    hf_config: Mapping[str, JsonValue]
    tokenizer_dir: Path | None


def convert(
    source: Location,
    target: Location,
    *,
    config: Location | None = None,
    dtype: Dtype | None = None,
    max_shard_bytes: int | None = None,
    objective: Objective | None = None,
    labels: int | None = None,
) -> str:
    """Write the weights in `source`, a checkpoint or a Hugging Face directory, to `target` as the other of the two.

    The target appears whole or not at all. Memory: the largest tensor, and a few pieces of 16 MiB.

    Args:
        source: a checkpoint, or a run's directory or one of checkpoints, of which the newest is taken; or a Hugging Face
            directory with its config.json.
        target: the directory to make; it must not exist, or be empty.
        config: to Hugging Face: a directory whose config.json and tokenizer files are to be taken along. None: those of the
            run that the checkpoint belongs to, or of the directory that it was converted from, as far as they are there.
        dtype: to Hugging Face: what to round the weights to. None: "float32".
        max_shard_bytes: to Hugging Face: above this, the weights go to several files. None: 2 GiB.
        objective: from Hugging Face: what the model's head is for. None: as the configuration says. Layers of the head that
            the directory doesn't have start from initial values, with a warning.
        labels: from Hugging Face: how many classes a classifier has. None: as the configuration says.

    Returns:
        The path of what was made.

    Raises:
        ConfigError: lists every option that is wrong or has no effect in this direction; a target that is not empty; a model
            that is not supported or belongs to no family.
        CheckpointError: `source` is neither of the two, is damaged, or lacks tensors; or the target can't be written.
    """
    found = _found(source)
    problems = list(_target_problems(target))
    if isinstance(found, Checkpoint):
        remedy = "has no effect: a checkpoint's weights have their head already; leave it out"
        problems += _given({"objective": objective, "labels": labels}, remedy)
        problems += _export_problems(target, dtype, max_shard_bytes)
        export = _attempt(problems, lambda: _plan_export(found, source, config))
        if problems or export is None:
            raise ConfigError(problems, where="the conversion")
        return _to_hugging_face(found, target, export, dtype or "float32", max_shard_bytes)
    remedy = "has no effect: a checkpoint holds float32 and no tokenizer; leave it out"
    problems += _given({"config": config, "dtype": dtype, "max_shard_bytes": max_shard_bytes}, remedy)
    if labels is not None and labels < 1:
        problems.append(Problem("labels", labels, "must be at least 1"))
    read = _attempt(problems, lambda: _read(found, objective, labels))
    if problems or read is None:
        raise ConfigError(problems, where="the conversion")
    return _to_checkpoint(found, read, target)


# -- what was asked for ------------------------------------------------------------------------------------------------


def _found(source: Location) -> Checkpoint | Path:
    """The checkpoint in `source`, or the Hugging Face directory that it is."""
    from mpsdk.families.read import CONFIG
    from mpsdk.run import Run
    from mpsdk.work_order import JOB_FILE

    storage, directory = locate(source)
    with os_errors(f"{source} cannot be read"):
        inside = storage.entries(directory)
        if not inside and storage.entry(directory) is None:
            raise CheckpointError(f"there is nothing at {storage.address(directory)}")
    if MANIFEST_FILE in inside:
        return Checkpoint.open(source)
    if not is_remote(source) and CONFIG in inside:
        return Path(directory)
    newest = find(source)
    if not is_remote(source) and JOB_FILE in inside:
        newest = Run.load(directory).checkpoints
        if not newest:
            raise CheckpointError(f"the run in {directory} has no checkpoint yet")
    if not newest:
        raise CheckpointError(
            f"{storage.address(directory)} is neither a checkpoint or a directory of checkpoints (there is no "
            f"{MANIFEST_FILE}) nor a Hugging Face directory (there is no {CONFIG})"
        )
    return Checkpoint.open(newest[0])


def _given(options: Mapping[str, object], remedy: str) -> Iterator[Problem]:
    """A problem for each option that is given."""
    yield from (Problem(name, got, remedy) for name, got in options.items() if got is not None)


def _target_problems(target: Location) -> Iterator[Problem]:
    storage, path = locate(target, follow=False)
    with os_errors(f"{target} cannot be looked at"):
        entry = storage.entry(path)
        occupied = entry is not None and (entry.kind != "directory" or storage.entries(path))
    if occupied:
        remedy = "already exists and is not empty; choose another directory, or remove this one"
        yield Problem("target", os.fspath(target), remedy)


def _export_problems(target: Location, dtype: object, max_shard_bytes: int | None) -> Iterator[Problem]:
    from mpsdk.families.export import DTYPES

    if is_remote(target):
        yield Problem("target", os.fspath(target), "a Hugging Face directory is written to a local path")
    if dtype is not None and dtype not in DTYPES:
        yield Problem("dtype", dtype, f"must be one of {', '.join(DTYPES)}")
    if max_shard_bytes is not None and max_shard_bytes < 1:
        yield Problem("max_shard_bytes", max_shard_bytes, "must be at least 1")


def _attempt(problems: list[Problem], make: Callable[[], T]) -> T | None:
    """What `make` makes; None when it raises ConfigError, whose problems are added to the others."""
    try:
        return make()
    except ConfigError as error:
        problems += error.problems
        return None


# -- from a checkpoint to Hugging Face ---------------------------------------------------------------------------------


def _spec_of(checkpoint: Checkpoint) -> TransformerSpec:
    """The spec that the manifest's plan has."""
    from mpsdk.families.spec import TransformerSpec

    description = checkpoint.plan.get("description")
    if not isinstance(description, dict):
        raise refuse(f"checkpoint {checkpoint.path} cannot be converted", ["its plan describes no model"])
    if description.get("spec") is None:
        remedy = "belongs to no family, and has no Hugging Face form"
        raise ConfigError([Problem("source", str(description.get("name")), remedy)], where="the conversion")
    try:
        return TransformerSpec.model_validate(description["spec"])
    except ValidationError as error:
        problems = [
            f"its model was described by another version of mpsdk: {p}" for p in validation_problems(error)
        ]
        raise refuse(f"checkpoint {checkpoint.path} cannot be converted", problems) from None


def _plan_export(checkpoint: Checkpoint, source: Location, config: Location | None) -> Export:
    """With the files that `config` names, or what the run knew that wrote the checkpoint, or what stood in the directory that
    it was converted from."""
    from mpsdk.families.read import read_model
    from mpsdk.work_order import JOB_FILE, WorkOrder

    spec, plan = _spec_of(checkpoint), checkpoint.plan
    if config is not None:
        read = read_model(os.fspath(config), objective=spec.head.objective, weights=False)
        if read.family.model_type != spec.family:
            remedy = f"is of a {read.family.model_type} model, and the checkpoint of a {spec.family} model"
            raise ConfigError([Problem("config", os.fspath(config), remedy)], where="the conversion")
        return Export(spec, cast("dict[str, JsonValue]", read.hf_config), read.directory)
    if "hf_config" in plan:
        directory = Path(str(plan.get("model_directory")))
        return Export(spec, cast("dict[str, JsonValue]", plan["hf_config"]), directory)
    if not is_remote(source):
        for directory in (Path(source), Path(checkpoint.path).parent.parent):
            with contextlib.suppress(MpsdkError):
                order = WorkOrder.load(directory / JOB_FILE)
                if order.plan.description.spec == spec:
                    return Export(spec, *order.carried())
    logger.warning(
        "%s doesn't lie in its run's directory: the export has no tokenizer and no token ids, unless config names a directory",
        checkpoint.path,
    )
    return Export(spec, {}, None)


def _to_hugging_face(
    checkpoint: Checkpoint, target: Location, planned: Export, dtype: Dtype, max_shard_bytes: int | None
) -> str:
    from mpsdk.families.describe import describe_spec
    from mpsdk.families.export import GIBIBYTE, export

    checkpoint.verify(payload=False)  # tensors are verified as they are read
    if problems := list(tensor_differences(checkpoint.shapes(WEIGHT), describe_spec(planned.spec))):
        raise refuse(f"checkpoint {checkpoint.path} does not hold its model", problems)
    with os_errors(f"{os.fspath(target)} could not be written"):
        made = export(
            checkpoint,
            planned.spec,
            Path(target),
            hf_config=planned.hf_config,
            tokenizer_dir=planned.tokenizer_dir,
            dtype=dtype,
            max_shard_bytes=max_shard_bytes or 2 * GIBIBYTE,
        )
    return str(made)


# -- from Hugging Face to a checkpoint ---------------------------------------------------------------------------------


def _read(directory: Path, objective: Objective | None, labels: int | None) -> ReadModel:
    from mpsdk.families.read import read_model

    read = read_model(directory, objective=objective, labels=labels)
    if labels is not None and not read.spec.head.classifies:
        remedy = f'a head for "{read.spec.head.objective}" has no classes; leave it out, or choose another objective'
        raise ConfigError([Problem("labels", labels, remedy)], where="the conversion")
    return read


def _to_checkpoint(directory: Path, read: ReadModel, target: Location) -> str:
    from mpsdk.families.describe import describe_spec
    from mpsdk.families.source import HuggingFaceSource

    source = HuggingFaceSource(directory, read.family, read.spec)
    description = describe_spec(read.spec)
    plan: dict[str, object] = {
        "description": description.model_dump(mode="json"),
        "hf_config": read.hf_config,
        "model_directory": str(directory),
    }
    meta = {
        "step": 0,
        "samples_consumed": 0,
        "framework": WRITER,
        "plan": plan,
        "plan_hash": hashlib.blake2b(canonical_json(plan), digest_size=8).hexdigest(),
        "naming": description.naming,
        "tied": {tensor.name: tensor.tied_to for tensor in description.tensors() if tensor.tied_to},
    }
    storage, path = locate(target, follow=False)
    unfinished = storage.address(path + f"{TEMPORARY}convert-{uuid.uuid4().hex[:8]}")
    try:
        part = write_rank(unfinished, 0, RankState(_shards(source, description), {}))
        commit(unfinished, target, [part], meta)
    except BaseException:
        with contextlib.suppress(OSError, CheckpointError):
            storage.remove_directory(locate(unfinished, follow=False)[1])
        raise
    return storage.address(path)


def _shards(source: HuggingFaceSource, description: ModelDescription) -> Iterator[Shard]:
    """Every weight in pieces as large as chunks, a tied one under its owner alone."""
    for tensor in description.tensors():
        if tensor.tied_to is None:
            for offset, shape in split(tensor.shape, CHUNK_BYTES // ITEM_BYTES):
                read = partial(source.read, tensor.name, WEIGHT, offset, shape)
                yield Shard(tensor.name, WEIGHT, tensor.shape, offset, shape, read)
