"""Which checkpoint is resumed from, which are kept: an intact one is never lost to a damaged one."""

from __future__ import annotations

import logging
import os
import shutil
import uuid
from pathlib import Path

import pytest

from mpsdk.checkpoint import find, latest_verified, prune, remove_leftovers, step_directory, storage
from mpsdk.checkpoint.storage import LocalStorage
from mpsdk.errors import CheckpointError
from tests.core.checkpoint.samples import row_shards, save, tensors, write_parts


def damage(root: Path, step: int) -> None:
    file = Path(step_directory(root, step)) / "rank-00000.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def steps(root: Path | str) -> list[int]:
    return [int(path.rpartition("-")[2]) for path in find(root)]


@pytest.fixture(params=["local", "remote"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path) if request.param == "local" else f"memory://{uuid.uuid4().hex}/runs"


def test_checkpoints_are_found_newest_first(root: str):
    for step in (5, 123456789, 99):
        save(root, step)
    assert steps(root) == [123456789, 99, 5]


def test_only_complete_checkpoints_are_found(tmp_path: Path):
    save(tmp_path, 10)
    write_parts(step_directory(tmp_path, 20, 1), row_shards(tensors(), 2))
    shutil.copytree(step_directory(tmp_path, 10), step_directory(tmp_path, 20, 2))  # even with a manifest
    Path(step_directory(tmp_path, 30)).mkdir()
    for name in ("step-40", "step-0000000040", "step-00000040x", "step-00000040.tmp-", "notes"):
        shutil.copytree(step_directory(tmp_path, 10), tmp_path / name)
    os.symlink(step_directory(tmp_path, 10), tmp_path / "step-00000050")
    (tmp_path / "step-00000060").write_text("a file")
    assert steps(tmp_path) == [10]


def test_a_root_that_is_not_there_has_no_checkpoints(root: str):
    assert find(root + "/none") == [] and latest_verified(root + "/none") is None
    assert prune(root + "/none", 1) == [] and remove_leftovers(root + "/none") == []


def test_the_newest_intact_checkpoint_is_resumed_from(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    for step in (10, 20, 30, 40):
        save(tmp_path, step)
    damage(tmp_path, 40)
    (Path(step_directory(tmp_path, 30)) / "manifest.json").write_text("{}")
    said: list[str] = []
    checkpoint = latest_verified(tmp_path, said.append)
    assert checkpoint and checkpoint.step == 20
    assert len(said) == 2
    assert "step-00000040 is damaged and passed over: rank-00000.safetensors: weight/" in said[0]
    assert "step-00000030 is damaged and passed over: manifest.json" in said[1]
    with caplog.at_level(logging.WARNING):
        latest_verified(tmp_path)
    assert [record.message for record in caplog.records] == said


def test_nobody_starts_afresh_in_silence_when_every_checkpoint_is_damaged(tmp_path: Path):
    for step in (10, 20):
        save(tmp_path, step)
        damage(tmp_path, step)
    with pytest.raises(CheckpointError) as error:
        latest_verified(tmp_path, lambda message: None)
    assert "step-00000010: rank-00000" in str(error.value) and "step-00000020: rank-00000" in str(error.value)
    assert "move them away to start from the first step" in str(error.value)


def test_pruning_keeps_the_newest(root: str):
    for step in (10, 20, 30, 40):
        save(root, step)
    assert prune(root, None) == [] and prune(root, 4) == []
    assert [path.rpartition("/")[2] for path in prune(root, 2)] == ["step-00000020", "step-00000010"]
    assert steps(root) == [40, 30]
    assert latest_verified(root)


def test_pruning_keeps_the_newest_intact_one_whatever_its_age(tmp_path: Path):
    for step in (10, 20, 30, 40):
        save(tmp_path, step)
    damage(tmp_path, 40)
    damage(tmp_path, 30)
    prune(tmp_path, 1)
    assert steps(tmp_path) == [40, 30, 20]
    damage(tmp_path, 20)
    assert prune(tmp_path, 1) == [] and steps(tmp_path) == [40, 30, 20]


def test_pruning_spares_protected_steps(tmp_path: Path):
    for step in (10, 20, 90, 100):
        save(tmp_path, step)
    prune(tmp_path, 2, protect=(20,))
    assert steps(tmp_path) == [100, 90, 20]


def test_pruning_without_payload_reads_no_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for step in (10, 20):
        save(tmp_path, step)
    original = LocalStorage.read

    def watched(self: LocalStorage, path: str, start: int, length: int) -> bytes | bytearray:
        assert start == 0, "a tensor was read"
        return original(self, path, start, length)

    monkeypatch.setattr(LocalStorage, "read", watched)
    prune(tmp_path, 1, payload=False)
    assert steps(tmp_path) == [20]


@pytest.mark.parametrize("keep", [0, -1])
def test_keeping_nothing_is_refused(tmp_path: Path, keep: int):
    with pytest.raises(CheckpointError, match=f"keep must be 1 or more, or None .* got {keep}"):
        prune(tmp_path, keep)


def test_leftovers_of_other_generations_are_removed(root: str):
    save(root, 10)
    for generation in (1, 2):
        write_parts(step_directory(root, 20, generation), row_shards(tensors(), 2))
    removed = remove_leftovers(root, generation=2)
    assert [path.rpartition("/")[2] for path in removed] == ["step-00000020.tmp-1"]
    assert [path.rpartition("/")[2] for path in remove_leftovers(root)] == ["step-00000020.tmp-2"]
    assert steps(root) == [10]


def test_a_checkpoint_that_was_set_aside_is_used_until_its_replacement_is_there(tmp_path: Path):
    save(tmp_path, 10)
    final = Path(step_directory(tmp_path, 10))
    final.rename(f"{final}.replaced")  # where a save of the same step was cut short
    assert remove_leftovers(tmp_path) == []
    checkpoint = latest_verified(tmp_path)
    assert checkpoint and checkpoint.path == f"{final}.replaced"
    shutil.copytree(f"{final}.replaced", final)
    assert find(tmp_path) == [str(final), f"{final}.replaced"]
    assert remove_leftovers(tmp_path) == [f"{final}.replaced"]
    assert find(tmp_path) == [str(final)]


def test_a_name_that_vanishes_while_it_is_listed_hides_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for step in (10, 20):
        save(tmp_path, step)
    left = [FileNotFoundError]
    original = storage._entry

    def entry(status: os.stat_result) -> storage.Entry:
        if left:
            raise left.pop()
        return original(status)

    monkeypatch.setattr(storage, "_entry", entry)
    assert len(find(tmp_path)) == 1


def test_what_cannot_be_listed_or_removed_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for step in (10, 20):
        save(tmp_path, step)

    def denied(*arguments: object, **named: object) -> None:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", denied)
        with pytest.raises(CheckpointError, match=r"old checkpoints could not be removed.*Permission denied"):
            prune(tmp_path, 1)
    assert steps(tmp_path) == [20, 10]
    monkeypatch.setattr(os, "scandir", denied)
    for function in (find, latest_verified, remove_leftovers):
        with pytest.raises(CheckpointError, match=r"cannot be listed.*Permission denied"):
            function(tmp_path)
