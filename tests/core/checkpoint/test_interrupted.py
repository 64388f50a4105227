"""A save that is interrupted at any operation on the disk: the last good checkpoint is still there, and is used."""

from __future__ import annotations

import errno
import os
import random
import resource
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from mpsdk.backend import RankState
from mpsdk.checkpoint import (
    Checkpoint,
    find,
    latest_verified,
    prune,
    remove_leftovers,
    step_directory,
    write_rank,
)
from mpsdk.errors import CheckpointError
from tests.core.checkpoint.samples import row_shards, save, shard, tensors

EFFECTS = {
    "local": (os, ("open", "fsync", "rename", "unlink", "rmdir", "makedirs")),
    "remote": (MemoryFileSystem, ("open", "cp_file", "rm_file", "rm", "makedirs")),
}


class PowerCut(BaseException):
    """Not an Exception: no handler tidies up, as when the process is killed."""


class Countdown:
    """Lets `count` operations happen, and no more."""

    def __init__(self, count: int) -> None:
        self.left = count

    def before(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def limited(*arguments: Any, **named: Any) -> Any:
            if self.left <= 0:
                raise PowerCut
            self.left -= 1
            return function(*arguments, **named)

        return limited


def contents_of(path: str) -> bytes:
    checkpoint = Checkpoint.open(path)
    return b"".join(
        checkpoint.read(name, slot, (0,) * len(shape), shape).tobytes()
        for slot in sorted(checkpoint.slots)
        for name, shape in sorted(checkpoint.shapes(slot).items())
    )


@pytest.mark.parametrize("step", [20, 30], ids=["a step that exists", "a new step"])
@pytest.mark.parametrize("kind", ["local", "remote"])
def test_whatever_operation_comes_last_a_complete_checkpoint_is_resumed_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, step: int
):
    owner, names = EFFECTS[kind]
    new = tensors(99)
    for count in range(1000):
        root = str(tmp_path / str(count)) if kind == "local" else f"memory://{uuid.uuid4().hex}"
        for earlier in (10, 20):
            save(root, earlier)
        old_bytes = contents_of(find(root)[0])
        countdown = Countdown(count)
        with monkeypatch.context() as patch:
            for name in names:
                patch.setattr(owner, name, countdown.before(getattr(owner, name)))
            try:
                path = save(root, step, new, generation=1)
                prune(root, 1, protect=(step,))
                finished = True
            except PowerCut:
                finished = False
        for found in find(root):
            Checkpoint.open(found).verify()
        latest = latest_verified(root)
        assert latest and latest.step in (20, step)
        kept = contents_of(latest.path)
        if finished:
            assert kept == contents_of(path) and kept != old_bytes
            assert count > 10, "no operation was interrupted: the test is blind"
            return
        again = save(root, step, new, generation=2)  # the next start of the job does it again
        remove_leftovers(root)
        prune(root, 1)
        assert find(root) == [again] and contents_of(again) != old_bytes
        if kept != old_bytes:
            assert kept == contents_of(again)
        if kind == "local":
            assert os.listdir(root) == [os.path.basename(again)]
    pytest.fail("the save never finished")


SAVER = """
import sys
from mpsdk.checkpoint import prune
from tests.core.checkpoint.samples import save, tensors
root, step = sys.argv[1], int(sys.argv[2])
while True:
    step += 1
    save(root, step, tensors(step), generation=sys.argv[2])
    prune(root, 2)
    print("saved", flush=True)
"""


def test_a_job_killed_while_it_saves_leaves_only_intact_checkpoints(tmp_path: Path):
    step = 0
    moments = random.Random(5)
    for _ in range(4):
        job = subprocess.Popen(
            [sys.executable, "-c", SAVER, str(tmp_path), str(step)], stdout=subprocess.PIPE
        )
        assert job.stdout and job.stdout.readline() == b"saved\n"
        time.sleep(0.1 * moments.random())
        job.send_signal(signal.SIGKILL)
        assert job.wait() == -signal.SIGKILL
        job.stdout.close()
        found = find(tmp_path)
        assert len(found) <= 3, "one more than is kept, when the end came before the pruning"
        for path in found:
            checkpoint = Checkpoint.open(path)
            checkpoint.verify()
            values = tensors(checkpoint.step)["head.norm.weight", "weight"]
            np.testing.assert_array_equal(checkpoint.read("head.norm.weight", "weight", (0,), (4,)), values)
        assert Checkpoint.open(found[0]).step > step
        step = Checkpoint.open(found[0]).step
        remove_leftovers(tmp_path)
        assert sorted(os.listdir(tmp_path)) == sorted(os.path.basename(path) for path in found)


def test_a_full_disk_says_so_and_leaves_no_half_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    save(tmp_path, 10)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(CheckpointError) as error:
            write_rank(step_directory(tmp_path, 20, 1), 0, RankState(row_shards(tensors(), 1)[0], {}))
    message = str(error.value)
    assert "rank 0 could not write rank-00000.safetensors" in message and "No space left on device" in message
    assert message.endswith("the newest complete checkpoint is still step-00000010")
    assert not list(Path(step_directory(tmp_path, 20, 1)).glob("*"))
    latest = latest_verified(tmp_path)
    assert latest and latest.step == 10


def test_a_write_that_the_system_cuts_short_leaves_no_half_file(tmp_path: Path):
    values = np.zeros((1024, 1024), np.float32)
    piece = shard("wide", "weight", values, (slice(0, 1024), slice(0, 1024)))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        with pytest.raises(
            CheckpointError, match=r"File too large.*Nothing was committed; there is no checkpoint yet"
        ):
            write_rank(step_directory(tmp_path, 1, 1), 0, RankState([piece], {}))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_failing_read_of_a_shard_leaves_no_half_file(tmp_path: Path):
    def failing() -> np.ndarray:
        raise RuntimeError("device lost")

    pieces = row_shards(tensors(), 1)[0]
    pieces[-1] = type(pieces[-1])("temperature", "weight", (), (), (), failing)
    with pytest.raises(RuntimeError, match="device lost"):
        write_rank(step_directory(tmp_path, 1, 1), 0, RankState(pieces, {}))
    assert not list(tmp_path.rglob("*.safetensors"))
