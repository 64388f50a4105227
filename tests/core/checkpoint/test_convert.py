"""Weights between checkpoints and Hugging Face directories: bit for bit, whole or not at all, in bounded memory."""

from __future__ import annotations

import filecmp
import json
import logging
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from mpsdk import Run
from mpsdk.backend import RankState
from mpsdk.checkpoint import Checkpoint, commit, convert, find, step_directory, write_rank
from mpsdk.errors import CheckpointError, ConfigError
from mpsdk.families import FAMILIES, family_of, read_model
from mpsdk.families.describe import describe_spec
from mpsdk.families.export import export
from mpsdk.families.hf import HuggingFaceSource
from tests.core.checkpoint.samples import meta, save
from tests.core.families.configurations import GPT2, LLAMA
from tests.core.families.test_weights import equal, random_source, written
from tests.core.jobs import MODEL, order_in, work
from tests.family_configs import configs

EVERY_HEAD = [(name, head.form.objective) for name, family in FAMILIES.items() for head in family.heads]


def same_directory(one: Path, other: Path) -> bool:
    """The same files; tensors bit for bit, whatever their order in a file."""
    names = sorted(path.name for path in one.iterdir())
    if names != sorted(path.name for path in other.iterdir()):
        return False
    for name in names:
        if not name.endswith(".safetensors"):
            if (one / name).read_bytes() != (other / name).read_bytes():
                return False
            continue
        first, second = load_file(one / name), load_file(other / name)
        if first.keys() != second.keys() or any(
            first[key].dtype != second[key].dtype or first[key].tobytes() != second[key].tobytes()
            for key in first
        ):
            return False
    return True


# -- there and back ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "objective"), EVERY_HEAD)
@settings(max_examples=2, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_a_directory_comes_back_bit_for_bit(
    name: str, objective: Any, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Configuration included; in several files, in each precision."""
    folder = tmp_path_factory.mktemp("convert")
    dtype: Any = data.draw(st.sampled_from(["float32", "bfloat16", "float16"]))
    shard = data.draw(st.sampled_from([2000, 1 << 30]))
    spec = FAMILIES[name].spec(data.draw(configs(name)), objective=objective)
    original = export(random_source(spec), spec, folder / "hf", dtype=dtype, max_shard_bytes=shard)
    convert(original, folder / "checkpoint")
    checkpoint = Checkpoint.open(folder / "checkpoint")
    checkpoint.verify()
    read = read_model(original)
    assert read.spec == spec
    assert equal(checkpoint, HuggingFaceSource(original, read.family, spec), spec)
    convert(folder / "checkpoint", folder / "again", dtype=dtype, max_shard_bytes=shard)
    assert same_directory(original, folder / "again")


def test_a_converted_checkpoint_holds_weights_alone_at_step_0(tmp_path: Path) -> None:
    spec = written(tmp_path / "hf", GPT2)
    assert convert(tmp_path / "hf", tmp_path / "checkpoint") == str(tmp_path / "checkpoint")
    checkpoint = Checkpoint.open(tmp_path / "checkpoint")
    assert (checkpoint.step, checkpoint.samples_consumed) == (0, 0)
    assert (checkpoint.slots, checkpoint.scalars) == (frozenset({"weight"}), {})
    assert checkpoint.manifest.tied == {"head.output.weight": "embedding.tokens.weight"}
    assert equal(checkpoint, random_source(spec), spec)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint", "hf"]


def test_tokenizer_and_token_ids_come_back_from_where_the_checkpoint_was_converted_from(
    tmp_path: Path,
) -> None:
    written(tmp_path / "hf", GPT2)
    (tmp_path / "hf" / "tokenizer.json").write_text("{}")
    convert(tmp_path / "hf", tmp_path / "checkpoint")
    convert(tmp_path / "checkpoint", tmp_path / "again")
    assert same_directory(tmp_path / "hf", tmp_path / "again")
    shutil.rmtree(tmp_path / "hf")
    convert(tmp_path / "checkpoint", tmp_path / "later")
    assert json.loads((tmp_path / "later" / "config.json").read_text())["bos_token_id"] == 30
    assert not (tmp_path / "later" / "tokenizer.json").exists()


def test_another_head_starts_from_initial_values_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    written(tmp_path / "hf", GPT2)
    with caplog.at_level(logging.WARNING):
        convert(tmp_path / "hf", tmp_path / "checkpoint", objective="sequence-classification", labels=3)
    assert "has none of head.classifier.weight: they start from initial values" in caplog.text
    assert Checkpoint.open(tmp_path / "checkpoint").shapes()["head.classifier.weight"] == (3, 8)
    convert(tmp_path / "checkpoint", tmp_path / "classifier")
    config = json.loads((tmp_path / "classifier" / "config.json").read_text())
    assert config["architectures"] == ["GPT2ForSequenceClassification"] and len(config["id2label"]) == 3


def test_a_checkpoint_may_lie_where_fsspec_reaches(tmp_path: Path) -> None:
    spec = written(tmp_path / "hf", LLAMA)
    place = "memory://converted/checkpoint"
    assert convert(tmp_path / "hf", place) == place
    convert(place, tmp_path / "again")
    assert equal(Checkpoint.open(place), random_source(spec), spec)
    assert same_directory(tmp_path / "hf", tmp_path / "again")


# -- runs ----------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("fake")
def test_a_run_resumes_from_a_converted_checkpoint_as_it_starts_from_the_directory(tmp_path: Path) -> None:
    """The same losses: the optimizer and the data start afresh."""
    written(tmp_path / "hf", MODEL)
    convert(tmp_path / "hf", tmp_path / "checkpoint")
    fresh = order_in(tmp_path / "fresh").model_copy(
        update={"pretrained": True, "model_directory": str(tmp_path / "hf")}
    )
    resumed = order_in(tmp_path / "resumed", resume=str(tmp_path / "checkpoint"))
    losses = [
        [event["loss"] for event in work(order) if event["event"] == "log"] for order in (fresh, resumed)
    ]
    assert len(losses[0]) > 2 and losses[0] == losses[1]
    weights = [Checkpoint.open(find(tmp_path / name / "checkpoints")[0]) for name in ("fresh", "resumed")]
    assert weights[0].slots == weights[1].slots > {"weight"}
    for slot in weights[0].slots:
        for name, shape in weights[0].shapes(slot).items():
            first, second = (each.read(name, slot, (0,) * len(shape), shape) for each in weights)
            np.testing.assert_array_equal(first, second)


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize("source", ["", "checkpoints", "checkpoints/step-00000008"])
def test_a_runs_checkpoint_becomes_what_the_run_exports(tmp_path: Path, source: str) -> None:
    """Optimizer state is left behind; configuration and tokenizer are the run's."""
    order = order_in(tmp_path / "run", world_size=2, distribution={"sharded_data_parallel": 2})
    order.save(tmp_path / "run" / "job.json")
    work(order)
    convert(tmp_path / "run" / source, tmp_path / "converted", dtype="bfloat16")
    Run.load(tmp_path / "run").export(tmp_path / "exported", dtype="bfloat16")
    assert json.loads((tmp_path / "converted" / "config.json").read_text())["eos_token_id"] == 256
    assert same_directory(tmp_path / "exported", tmp_path / "converted")


@pytest.mark.usefixtures("fake")
def test_a_checkpoint_away_from_its_run_takes_along_what_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    work(order_in(tmp_path / "run"))
    shutil.move(tmp_path / "run" / "checkpoints" / "step-00000008", tmp_path / "step-00000008")
    with caplog.at_level(logging.WARNING):
        convert(tmp_path / "step-00000008", tmp_path / "bare")
    assert "doesn't lie in its run's directory" in caplog.text
    assert json.loads((tmp_path / "bare" / "config.json").read_text())["eos_token_id"] is None

    written(tmp_path / "named", {**MODEL, "eos_token_id": 7})
    (tmp_path / "named" / "tokenizer.json").write_text("{}")
    convert(tmp_path / "step-00000008", tmp_path / "out", config=tmp_path / "named")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["eos_token_id"] == 7
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"


@pytest.mark.usefixtures("fake")
def test_a_run_without_a_checkpoint_is_told_as_such(tmp_path: Path) -> None:
    order_in(tmp_path).save(tmp_path / "job.json")
    with pytest.raises(CheckpointError, match="has no checkpoint yet"):
        convert(tmp_path, tmp_path / "out")


# -- what is refused -----------------------------------------------------------------------------------------------------


def test_everything_that_is_wrong_with_an_export_is_told_at_once(tmp_path: Path) -> None:
    written(tmp_path / "hf", GPT2)
    written(tmp_path / "llama", LLAMA)
    convert(tmp_path / "hf", tmp_path / "checkpoint")
    with pytest.raises(ConfigError) as caught:
        convert(
            tmp_path / "checkpoint",
            tmp_path / "hf",
            config=tmp_path / "llama",
            dtype="float8",  # type: ignore[arg-type]
            max_shard_bytes=0,
            objective="causal-lm",
            labels=2,
        )
    assert [problem.field for problem in caught.value.problems] == [
        "target",
        "objective",
        "labels",
        "dtype",
        "max_shard_bytes",
        "config",
    ]


def test_everything_that_is_wrong_with_an_import_is_told_at_once(tmp_path: Path) -> None:
    written(tmp_path / "hf", GPT2)
    occupied = tmp_path / "occupied"
    occupied.mkdir()
    (occupied / "mine").write_text("kept")
    with pytest.raises(ConfigError) as caught:
        convert(
            tmp_path / "hf",
            occupied,
            config=tmp_path,
            dtype="float32",
            max_shard_bytes=1,
            objective="masked-lm",
            labels=0,
        )
    assert [problem.field for problem in caught.value.problems] == [
        "target",
        "config",
        "dtype",
        "max_shard_bytes",
        "labels",
        "training.objective",
    ]
    assert [path.name for path in occupied.iterdir()] == ["mine"]


def test_classes_of_a_model_that_has_none_are_refused(tmp_path: Path) -> None:
    written(tmp_path / "hf", GPT2)
    with pytest.raises(ConfigError, match=r'labels \(got 3\): a head for "causal-lm" has no classes'):
        convert(tmp_path / "hf", tmp_path / "checkpoint", labels=3)


@pytest.mark.parametrize(
    ("made", "says"),
    [(False, "there is nothing at"), (True, "neither a checkpoint .* nor a Hugging Face directory")],
)
def test_a_source_that_is_neither_is_told_as_such(tmp_path: Path, made: bool, says: str) -> None:
    if made:
        (tmp_path / "source").mkdir()
    with pytest.raises(CheckpointError, match=says):
        convert(tmp_path / "source", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_weights_that_do_not_fit_are_listed_and_nothing_is_left(tmp_path: Path) -> None:
    written(tmp_path / "hf", GPT2)
    path = tmp_path / "hf" / "model.safetensors"
    tensors = load_file(path)
    del tensors["transformer.ln_f.weight"]
    save_file({**tensors, "transformer.h.7.ln_1.bias": np.zeros(8, np.float32)}, path)
    with pytest.raises(CheckpointError) as caught:
        convert(tmp_path / "hf", tmp_path / "checkpoint")
    assert "missing: transformer.ln_f.weight" in str(caught.value)
    assert "unexpected: transformer.h.7.ln_1.bias" in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_a_damaged_checkpoint_is_told_and_nothing_is_left(tmp_path: Path) -> None:
    written(tmp_path / "hf", GPT2)
    convert(tmp_path / "hf", tmp_path / "checkpoint")
    path = tmp_path / "checkpoint" / "rank-00000.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="is damaged"):
        convert(tmp_path / "checkpoint", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint", "hf"]


def test_a_disk_that_fills_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(tmp_path / "hf", GPT2)
    reads = iter(range(5))

    def full(*arguments: object) -> object:
        if next(reads, None) is None:
            raise OSError(28, "No space left on device")
        return read(*arguments)  # type: ignore[arg-type]

    read = HuggingFaceSource.read
    monkeypatch.setattr(HuggingFaceSource, "read", full)
    with pytest.raises(CheckpointError, match="No space left on device"):
        convert(tmp_path / "hf", tmp_path / "checkpoint")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_a_checkpoint_of_no_family_and_one_that_describes_no_model_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="its plan describes no model"):
        convert(save(tmp_path, 7), tmp_path / "out")
    described = {"plan": {"description": {"name": "mine", "spec": None}}}
    with pytest.raises(ConfigError, match="belongs to no family"):
        convert(save(tmp_path, 8, **described), tmp_path / "out")


def test_a_checkpoint_without_some_of_its_models_tensors_is_refused(tmp_path: Path) -> None:
    spec = family_of("gpt2").spec(GPT2)
    temporary, final = step_directory(tmp_path, 1, "x"), step_directory(tmp_path, 1)
    part = write_rank(temporary, 0, RankState([], {}))
    plan = {"description": describe_spec(spec).model_dump(mode="json")}
    commit(temporary, final, [part], meta(1, plan=plan))
    with pytest.raises(CheckpointError, match=r"embedding.tokens.weight \[31, 8\] is missing"):
        convert(final, tmp_path / "out")


# -- memory and imports --------------------------------------------------------------------------------------------------

CONVERT_WITHIN = """
import re, resource, sys
from mpsdk.checkpoint import convert
import mpsdk.run, mpsdk.families.hf
source, target, allowed, whole = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
held = 1024 * int(re.search(r"VmData:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
resource.setrlimit(resource.RLIMIT_DATA, (held + allowed, held + allowed))
convert(source, target)
try:
    bytearray(whole)
except MemoryError:
    print(sorted({"torch", "tensorflow", "keras", "transformers"} & set(sys.modules)))
"""
LARGE = {
    "model_type": "gpt2",
    "vocab_size": 32768,
    "n_embd": 512,
    "n_head": 8,
    "n_layer": 12,
    "n_positions": 128,
}
MEBIBYTE = 1 << 20
PIECE = 16 * MEBIBYTE


class Counting:
    """A source of weights that are quick to make and not all the same."""

    slots = frozenset({"weight"})

    def __init__(self) -> None:
        self.scalars: dict[str, float | int] = {}

    def read(self, name: str, slot: str, offset: tuple[int, ...], shape: tuple[int, ...]) -> Any:
        return np.arange(np.prod(shape), dtype=np.float32).reshape(shape) + len(name) + sum(offset)


@pytest.mark.skipif(sys.platform != "linux", reason="the limit on a process's data is Linux's")
def test_a_model_is_converted_in_the_memory_of_its_largest_tensor_without_a_framework(tmp_path: Path) -> None:
    """The system refuses the converting process more memory than its bound.

    From a checkpoint the whole Hugging Face tensor is held, and of what it is made of: a chunk's bytes, the slice that they
    are copied to, and what finds values that are too large, each a piece at most; a piece more for what the allocator keeps.
    To a checkpoint, a piece as it is in the file, as float32, and turned; two more for threads' stacks and the allocator.
    The file that is read is mapped, and the system takes its pages back when it needs them: they don't count as data.
    """
    spec = family_of("gpt2").spec(LARGE)
    description = describe_spec(spec)
    whole = 4 * description.parameters
    largest = max(4 * tensor.elements for tensor in description.tensors())
    assert whole > 200 * MEBIBYTE > 3 * largest
    export(Counting(), spec, tmp_path / "hf")
    for source, target, allowed in (
        ("hf", "checkpoint", 5 * PIECE),
        ("checkpoint", "again", largest + 4 * PIECE),
    ):
        assert allowed < whole - 4 * PIECE
        command = [sys.executable, "-c", CONVERT_WITHIN]
        arguments = [str(tmp_path / source), str(tmp_path / target), str(allowed), str(whole)]
        done = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=120)
        assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr
    files = [tmp_path / name / "model.safetensors" for name in ("hf", "again")]
    assert filecmp.cmp(*files, shallow=False)
