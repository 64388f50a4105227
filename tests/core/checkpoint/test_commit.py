"""Nothing is written that could not be read, and nothing is committed that is not whole: every problem is listed."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mpsdk.backend import RankState, Shard
from mpsdk.checkpoint import Checkpoint, commit, find, step_directory, write_rank
from mpsdk.errors import CheckpointError
from tests.core.checkpoint.samples import meta, row_shards, save, shard, tensors, write_parts

Parts = list[dict[str, Any]]


def snapshot(root: Path) -> dict[Path, tuple[int, int, int]]:
    found = {path: path.stat() for path in root.rglob("*")}
    return {path: (status.st_ino, status.st_size, status.st_mtime_ns) for path, status in found.items()}


def refusal(root: Path, parts: Parts, description: dict[str, object] | None = None) -> str:
    """The error of committing step 20, which leaves everything as it was."""
    before = snapshot(root)
    with pytest.raises(CheckpointError) as error:
        commit(step_directory(root, 20, 1), step_directory(root, 20), parts, description or meta(20))
    assert snapshot(root) == before
    return str(error.value)


@pytest.fixture
def parts(tmp_path: Path) -> Parts:
    """Step 10 is complete; step 20 is written by two ranks, and not committed."""
    save(tmp_path, 10)
    return write_parts(step_directory(tmp_path, 20, 1), row_shards(tensors(), 2))


def test_a_missing_rank_is_refused_with_every_hole_that_it_leaves(tmp_path: Path, parts: Parts):
    message = refusal(tmp_path, parts[:1])
    assert "weight/blocks.0.up.weight, shape [5, 3]: [2:5, 0:3] is written by no rank" in message
    assert "exp_avg/blocks.0.up.weight" in message and "weight/head.norm.weight" in message
    assert "rank-00001.safetensors is not one of the ranks' files" in message
    assert message.endswith("Nothing was committed; the newest complete checkpoint is still step-00000010")


def test_what_two_ranks_wrote_is_refused(tmp_path: Path):
    shards = row_shards(tensors(), 2)
    shards[1] += [piece for piece in shards[0] if piece.slot == "exp_avg"]
    message = refusal(tmp_path, write_parts(step_directory(tmp_path, 20, 1), shards))
    assert "1 problem:" in message
    assert "[0:2, 0:3] is written 2 times, in rank-00000.safetensors, rank-00001.safetensors" in message
    assert message.endswith("Nothing was committed; there is no checkpoint yet")


def test_what_one_rank_wrote_twice_is_refused(tmp_path: Path):
    shards = row_shards(tensors(), 1)
    shards[0].append(shards[0][0])
    message = refusal(tmp_path, write_parts(step_directory(tmp_path, 20, 1), shards))
    assert "[0:5, 0:3] is written 2 times, in rank-00000.safetensors" in message


def test_many_holes_of_a_tensor_are_counted(tmp_path: Path):
    values = np.ones((20, 2), np.float32)
    pieces = [shard("t", "weight", values, (slice(row, row + 1), slice(0, 2))) for row in range(0, 20, 2)]
    message = refusal(tmp_path, write_parts(step_directory(tmp_path, 20, 1), [pieces]))
    assert "[1:2, 0:2] is written by no rank" in message and "weight/t: 7 more such places" in message


def test_ranks_that_disagree_are_refused(tmp_path: Path, parts: Parts):
    parts[1]["scalars"]["optimizer_step"] = 8
    parts[1]["tensors"]["weight/head.norm.weight"]["shape"] = [5]
    message = refusal(tmp_path, parts)
    assert "2 problems" in message and "'optimizer_step': 8" in message
    assert "weight/head.norm.weight: global shape [5] on rank 1, [4] on another" in message


def test_a_rank_handed_in_twice_is_refused(tmp_path: Path, parts: Parts):
    assert "rank 1 was handed in twice" in refusal(tmp_path, [*parts, parts[1]])


def test_parts_that_are_not_parts_are_refused(tmp_path: Path, parts: Parts):
    del parts[0]["files"]
    message = refusal(tmp_path, [*parts, {}])
    assert "part 0: files: Field required" in message and "part 2: rank: Field required" in message
    assert "no rank's part was given" in refusal(tmp_path, [])


def test_files_that_changed_since_they_were_written_are_refused(tmp_path: Path, parts: Parts):
    directory = Path(step_directory(tmp_path, 20, 1))
    (directory / "rank-00000.safetensors").unlink()
    (directory / "rank-00001.safetensors").write_bytes(b"short")
    (directory / "core.1234").write_bytes(b"")
    message = refusal(tmp_path, parts)
    assert "3 problems" in message and "rank-00000.safetensors is missing" in message
    assert "rank-00001.safetensors has 5 bytes" in message and "core.1234 is not one of" in message


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"step": -1}, "meta: step: Input should be greater than or equal to 0"),
        ({"step": True}, "meta: step: Input should be a valid integer"),
        ({"samples": 3}, "meta: samples: Extra inputs are not permitted"),
        ({"plan": {"degrees": object()}}, "meta: plan"),
        ({"plan": {"x": float("nan")}}, "meta: plan: Out of range float"),
        ({"naming": "hugging face"}, "meta: naming: Input should be 'canonical' or 'module'"),
        ({"tied": {"head.output.weight": "no.such"}}, "'head.output.weight' is tied to 'no.such'"),
        ({"step": 30}, "the directory is named for step 20, and meta has step 30"),
    ],
)
def test_a_description_that_cannot_be_stored_is_refused(
    tmp_path: Path, parts: Parts, change: dict[str, object], said: str
):
    assert said in refusal(tmp_path, parts, {**meta(20), **change})


def test_everything_that_is_wrong_is_listed_at_once(tmp_path: Path, parts: Parts):
    message = refusal(tmp_path, parts[:1], {**meta(20), "naming": "other", "plan_hash": 3})
    for said in (
        "meta: naming",
        "meta: plan_hash",
        "is written by no rank",
        "is not one of the ranks' files",
    ):
        assert said in message


def test_the_two_directories_must_lie_side_by_side(tmp_path: Path, parts: Parts):
    tmp = step_directory(tmp_path, 20, 1)
    for final in (tmp, step_directory(tmp_path / "other", 20), tmp_path / "step-00000020.tmp-1" / ".."):
        with pytest.raises(CheckpointError, match="must lie beside"):
            commit(tmp, final, parts, meta(20))


def test_what_is_not_a_checkpoint_is_never_replaced(tmp_path: Path, parts: Parts):
    tmp, final = step_directory(tmp_path, 20, 1), Path(step_directory(tmp_path, 20))
    final.mkdir()
    (final / "thesis.txt").write_text("mine")
    with pytest.raises(CheckpointError, match=r"is not a checkpoint, it holds 'thesis\.txt': move it away"):
        commit(tmp, final, parts, meta(20))
    assert (final / "thesis.txt").read_text() == "mine"
    final.rename(tmp_path / "elsewhere")
    os.symlink(tmp_path / "elsewhere", final)
    with pytest.raises(CheckpointError, match="is a link or a file: move it away"):
        commit(tmp, final, parts, meta(20))
    final.unlink()
    commit(tmp, final, parts, meta(20))  # a refused commit can be tried again
    Checkpoint.open(final).verify()


@pytest.mark.parametrize(
    ("piece", "said"),
    [
        (("../x", "weight", (2,), (0,), (2,)), "reads as a path"),
        (("/etc/x", "weight", (2,), (0,), (2,)), "reads as a path"),
        (("a//b", "weight", (2,), (0,), (2,)), "reads as a path"),
        (("a\0b", "weight", (2,), (0,), (2,)), "control characters"),
        (("a\\b", "weight", (2,), (0,), (2,)), "backslashes"),
        (("", "weight", (2,), (0,), (2,)), "must have 1 to 1024 characters"),
        (("x" * 2000, "weight", (2,), (0,), (2,)), "must have 1 to 1024 characters"),
        (("a", "../weight", (2,), (0,), (2,)), "slot '..' is not"),
        (("a", "weight\n", (2,), (0,), (2,)), "slot 'weight\\n' is not"),
        (("a", "Weight", (2,), (0,), (2,)), "slot 'Weight' is not"),
        (("a", "weight", (2,), (1,), (2,)), "a shard of shape [2] at [1] is outside the global shape [2]"),
        (("a", "weight", (2,), (-1,), (2,)), "is outside the global shape"),
        (("a", "weight", (2, 1), (0,), (2,)), "is outside the global shape"),
    ],
)
def test_a_shard_that_does_not_fit_is_refused_before_anything_is_written(
    tmp_path: Path, piece: Any, said: str
):
    wrong = Shard(*piece, read=lambda: np.zeros(2, np.float32))
    with pytest.raises(CheckpointError) as error:
        write_rank(step_directory(tmp_path, 1, 1), 0, RankState([wrong], {}))
    assert said in str(error.value)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("read", "said"),
    [
        (
            lambda: np.zeros(2, np.float64),
            "`read` gave float64 of shape [2], and the shard is float32 of shape [2]",
        ),
        (lambda: np.zeros((2, 1), np.float32), "`read` gave float32 of shape [2, 1]"),
        (lambda: np.zeros(2, ">f4"), "`read` gave >f4"),
    ],
)
def test_a_shard_that_reads_as_something_else_is_refused(tmp_path: Path, read: Callable[[], Any], said: str):
    wrong = Shard("a", "weight", (2,), (0,), (2,), read)
    with pytest.raises(CheckpointError) as error:
        write_rank(step_directory(tmp_path, 1, 1), 0, RankState([wrong], {}))
    assert said in str(error.value)
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize("scalars", [{"loss_scale": float("inf")}, {"loss_scale": "1"}, {"on": True}])
def test_a_scalar_that_is_not_a_finite_number_is_refused(tmp_path: Path, scalars: dict[str, Any]):
    with pytest.raises(CheckpointError, match="rank 0's state cannot be written"):
        write_rank(step_directory(tmp_path, 1, 1), 0, RankState([], scalars))


def test_values_need_not_lie_in_one_piece_of_memory(tmp_path: Path):
    values = np.arange(24, dtype=np.float32).reshape(4, 6).T[::2]
    tmp, final = step_directory(tmp_path, 1, 1), step_directory(tmp_path, 1)
    box = (slice(0, 3), slice(0, 4))
    commit(tmp, final, write_parts(tmp, [[shard("a", "weight", values, box)]]), meta(1))
    np.testing.assert_array_equal(Checkpoint.open(final).read("a", "weight", (0, 0), (3, 4)), values)


def test_nothing_is_written_through_a_planted_link(tmp_path: Path):
    outside, root = tmp_path / "outside", tmp_path / "root"
    outside.mkdir()
    root.mkdir()
    (outside / "victim").write_text("mine")
    os.symlink(outside, step_directory(root, 1, 1))
    with pytest.raises(CheckpointError, match="is a link or a file, not a directory"):
        write_parts(step_directory(root, 1, 1), row_shards(tensors(), 1))
    Path(step_directory(root, 2, 1)).mkdir()
    os.symlink(outside / "victim", Path(step_directory(root, 2, 1)) / "rank-00000.safetensors")
    save(root, 2)
    assert [(path.name, path.read_text()) for path in outside.iterdir()] == [("victim", "mine")]


@pytest.mark.parametrize("generation", ["../x", "/x", "", "a b", "a\0", "a\n", "x" * 300, "a/b", ".."])
def test_a_generation_that_leads_elsewhere_is_refused(generation: str):
    with pytest.raises(CheckpointError, match="generation must be"):
        step_directory("root", 1, generation)


def test_paths_that_no_storage_has_are_refused():
    for path in ("", "a\0b", "memory://a/../b", "no-such-protocol://a"):
        with pytest.raises(CheckpointError):
            find(path)
    with pytest.raises(CheckpointError, match="0 or more, not -1"):
        step_directory("root", -1)


def test_directories_are_named_by_step_and_generation():
    assert step_directory("runs/a", 100) == "runs/a/step-00000100"
    assert step_directory(Path("runs/a"), 100, 3) == "runs/a/step-00000100.tmp-3"
    assert step_directory("memory://runs/", 123456789) == "memory://runs/step-123456789"
