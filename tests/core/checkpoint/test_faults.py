"""Damage of every kind is found, named, and answered with the checkpoint to use instead."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mpsdk.checkpoint import Checkpoint, Manifest, latest_verified
from mpsdk.errors import CheckpointError
from tests.core.checkpoint.samples import save, tensors

RANKS = ("rank-00000.safetensors", "rank-00001.safetensors")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A checkpoint of step 20, an intact one of step 10 beside it."""
    save(tmp_path, 10)
    return Path(save(tmp_path, 20))


def damage_of(path: Path) -> str:
    with pytest.raises(CheckpointError) as error:
        Checkpoint.open(path).verify()
    return str(error.value)


def flip(file: Path, offset: int, bit: int) -> None:
    data = bytearray(file.read_bytes())
    data[offset] ^= 1 << bit
    file.write_bytes(data)


def read_everything(path: Path, contents: dict[tuple[str, str], np.ndarray]) -> None:
    """Raises CheckpointError, or gives exactly the values that were saved."""
    checkpoint = Checkpoint.open(path)
    for (name, slot), values in contents.items():
        held = checkpoint.read(name, slot, (0,) * values.ndim, values.shape)
        assert held.tobytes() == values.tobytes(), f"{slot}/{name} has wrong values without an error"


# -- bits, bytes and files ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", RANKS)
@pytest.mark.parametrize("bits", [pytest.param(range(8), marks=pytest.mark.long, id="all bits"), None])
def test_one_flipped_bit_at_any_offset_of_a_ranks_file_is_found(
    tmp_path: Path, file: str, bits: range | None
):
    path = Path(save(tmp_path, 20))
    size = (path / file).stat().st_size
    for offset in range(size):
        for bit in bits or [offset % 8]:
            flip(path / file, offset, bit)
            assert file in damage_of(path), f"bit {bit} of byte {offset}"
            with contextlib.suppress(CheckpointError):
                read_everything(path, tensors(20))
            flip(path / file, offset, bit)
    Checkpoint.open(path).verify()


def test_one_flipped_bit_at_any_offset_of_the_manifest_is_found(path: Path):
    data = (path / "manifest.json").read_bytes()
    for offset in range(len(data)):
        for bit in range(8):
            flipped = bytearray(data)
            flipped[offset] ^= 1 << bit
            with pytest.raises(CheckpointError):
                Manifest.from_bytes(bytes(flipped))
    flip(path / "manifest.json", len(data) // 2, 3)
    assert "manifest.json: it was edited or damaged" in damage_of(path)


@pytest.mark.parametrize("file", ["manifest.json", *RANKS])
def test_every_truncation_is_found(path: Path, file: str):
    data = (path / file).read_bytes()
    for length in range(0, len(data), 7):
        (path / file).write_bytes(data[:length])
        assert file in damage_of(path)
        with pytest.raises(CheckpointError):
            read_everything(path, tensors(20))


@pytest.mark.parametrize("file", ["manifest.json", *RANKS])
def test_bytes_after_the_end_are_found(path: Path, file: str):
    with (path / file).open("ab") as stream:
        stream.write(b"\n")
    assert file in damage_of(path)


@pytest.mark.parametrize("file", ["manifest.json", *RANKS])
def test_a_missing_file_is_found(path: Path, file: str):
    (path / file).unlink()
    assert file in damage_of(path)


def test_swapped_files_are_found(path: Path):
    one, other = (path / file for file in RANKS)
    one.rename(path / "aside")
    other.rename(one)
    (path / "aside").rename(other)
    message = damage_of(path)
    assert all(file in message for file in RANKS)


def test_a_file_of_another_checkpoint_is_found(path: Path):
    shutil.copy(path.parent / "step-00000010" / RANKS[1], path / RANKS[1])
    assert "weight/blocks.0.up.weight/0 at [2:5, 0:3] is damaged" in damage_of(path)


def test_the_manifest_of_another_checkpoint_is_found(path: Path):
    shutil.copy(path.parent / "step-00000010" / "manifest.json", path / "manifest.json")
    assert "is of step 10, the directory is named for step 20" in damage_of(path)


def test_an_extra_file_or_directory_is_found(path: Path):
    (path / "rank-00002.safetensors").write_bytes(b"")
    (path / "more").mkdir()
    message = damage_of(path)
    assert "2 problems" in message
    assert "rank-00002.safetensors does not belong" in message and "more does not belong" in message


def test_every_damaged_chunk_is_listed_and_the_intact_older_checkpoint_named(path: Path):
    size = (path / RANKS[1]).stat().st_size
    flip(path / RANKS[1], size - 1, 0)
    flip(path / RANKS[1], Checkpoint.open(path).manifest.files[RANKS[1]].header_bytes, 0)
    (path / RANKS[0]).unlink()
    message = damage_of(path)
    assert "3 problems" in message
    assert "weight/blocks.0.up.weight/0 at [2:5, 0:3]" in message and "weight/head.norm.weight/0" in message
    assert message.endswith(f"The older checkpoint {path.parent / 'step-00000010'} is intact: use that one.")


def test_no_older_checkpoint_is_recommended_that_is_damaged_itself(path: Path):
    older = path.parent / "step-00000010"
    for place in (older, path):
        flip(place / RANKS[0], (place / RANKS[0]).stat().st_size - 1, 0)
    assert damage_of(path).endswith(f"No older checkpoint in {path.parent} is intact.")
    assert damage_of(older).endswith(f"There is no older checkpoint in {path.parent}.")


def test_a_quick_verification_leaves_the_tensors_unread(path: Path):
    flip(path / RANKS[0], (path / RANKS[0]).stat().st_size - 1, 0)
    Checkpoint.open(path).verify(payload=False)
    (path / RANKS[1]).write_bytes(b"short")
    with pytest.raises(CheckpointError, match="truncated"):
        Checkpoint.open(path).verify(payload=False)


def test_a_reader_of_slices_is_not_troubled_by_damage_elsewhere(path: Path):
    flip(path / RANKS[1], (path / RANKS[1]).stat().st_size - 1, 0)
    checkpoint = Checkpoint.open(path)
    values = tensors(20)["head.norm.weight", "weight"]
    np.testing.assert_array_equal(checkpoint.read("head.norm.weight", "weight", (0,), (2,)), values[:2])
    with pytest.raises(CheckpointError, match=r"weight/head\.norm\.weight/0 at \[2:4\] is damaged"):
        checkpoint.read("head.norm.weight", "weight", (1,), (2,))


# -- what was planted -----------------------------------------------------------------------------------------------


def test_links_are_not_followed(path: Path, tmp_path: Path):
    elsewhere = tmp_path / "elsewhere.safetensors"
    (path / RANKS[0]).rename(elsewhere)
    os.symlink(elsewhere, path / RANKS[0])
    assert f"{RANKS[0]} is not a file (links are not followed)" in damage_of(path)
    (path / "manifest.json").rename(tmp_path / "manifest.json")
    os.symlink(tmp_path / "manifest.json", path / "manifest.json")
    assert "manifest.json is not a file" in damage_of(path)


class Canary:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("file", [".metadata", "rng_state.pth", *RANKS, "manifest.json"])
def test_a_planted_pickle_is_reported_and_never_run(path: Path, tmp_path: Path, file: str):
    canary = tmp_path / "canary"
    (path / file).write_bytes(pickle.dumps(Canary(canary)))
    assert file in damage_of(path)
    assert latest_verified(tmp_path, log=lambda message: None)
    assert not canary.exists()


# -- a manifest that was edited, its digest with it -------------------------------------------------------------------


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the manifest and give it the digest that it then must have."""
    content = json.loads((path / "manifest.json").read_text())
    del content["digest"]
    change(content)
    rest = json.dumps(content, sort_keys=True, separators=(",", ":"))
    digest = hashlib.sha256(rest.encode()).hexdigest()
    (path / "manifest.json").write_text(f'{{"digest":"{digest}",{rest[1:]}')


def chunks(content: dict[str, Any]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = content["tensors"]["weight/blocks.0.up.weight"]["chunks"]
    return found


def move_file(name: str) -> Callable[[dict[str, Any]], object]:
    def change(content: dict[str, Any]) -> None:
        content["files"][name] = content["files"].pop(RANKS[0])
        for tensor in content["tensors"].values():
            for chunk in tensor["chunks"]:
                chunk["file"] = name if chunk["file"] == RANKS[0] else chunk["file"]

    return change


EDITS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "hole": (lambda content: chunks(content).pop(), "[2:5, 0:3] is written by no rank"),
    "overlap": (lambda content: chunks(content).append(chunks(content)[0]), "[0:2, 0:3] is written 2 times"),
    "moved": (lambda content: chunks(content)[0].update(offset=[1, 0]), "[0:1, 0:3] is written by no rank"),
    "outside": (lambda content: chunks(content)[0].update(offset=[4, 0]), "is outside the shape [5, 3]"),
    "negative": (lambda content: chunks(content)[0].update(offset=[-1, 0]), "greater than or equal to 0"),
    "dimensions": (lambda content: chunks(content)[0].update(offset=[0]), "is outside the shape"),
    "key of another": (
        lambda content: chunks(content)[0].update(key="weight/head.norm.weight/0"),
        "does not belong to tensor 'weight/blocks.0.up.weight'",
    ),
    "key of nothing": (
        lambda content: chunks(content)[0].update(key="weight/blocks.0.up.weight/9"),
        "holds no weight/blocks.0.up.weight/9",
    ),
    "tensor left out": (
        lambda content: content["tensors"].pop("weight/head.norm.weight"),
        "weight/head.norm.weight/0 is not in the manifest",
    ),
    "digest of a chunk": (lambda content: chunks(content)[0].update(sha256="0" * 64), "is damaged"),
    "dtype": (lambda content: content["tensors"]["weight/temperature"].update(dtype="float16"), "float32"),
    "length": (lambda content: content["files"][RANKS[0]].update(bytes=10**15), "is truncated"),
    "header": (lambda content: content["files"][RANKS[0]].update(header_bytes=10**8), "ends before byte"),
    "huge header": (
        lambda content: content["files"][RANKS[0]].update(header_bytes=2 << 30),
        "less than or equal",
    ),
    "file above": (move_file("../step-00000010/" + RANKS[0]), "pattern"),
    "absolute file": (move_file("/etc/passwd"), "pattern"),
    "file with a line break": (move_file(RANKS[0] + "\n"), "pattern"),
    "tensor above": (
        lambda content: content["tensors"].update({"weight/../x": content["tensors"]["weight/temperature"]}),
        "reads as a path",
    ),
    "step": (lambda content: content.update(step=30), "is of step 30"),
    "version": (
        lambda content: content.update(version=2),
        "its format version is 2; this mpsdk reads version 1",
    ),
    "format": (lambda content: content.update(format="other"), "its format is 'other'"),
    "unknown field": (lambda content: content.update(more=1), "more: Extra inputs are not permitted"),
    "step as text": (lambda content: content.update(step="20"), "step: Input should be a valid integer"),
    "tied to nothing": (lambda content: content.update(tied={"a": "b"}), "'a' is tied to 'b'"),
    "deep nesting": (lambda content: content.update(plan=nested(500)), "manifest.json"),
}


def nested(depth: int) -> dict[str, Any]:
    return {"deeper": nested(depth - 1)} if depth else {}


@pytest.mark.parametrize("kind", EDITS)
def test_an_edited_manifest_with_a_new_digest_is_still_found_out(path: Path, kind: str):
    change, said = EDITS[kind]
    edit(path, change)
    assert said in damage_of(path)


def test_bytes_that_no_tensor_covers_are_found_in_spite_of_an_edited_length(path: Path):
    size = (path / RANKS[0]).stat().st_size
    with (path / RANKS[0]).open("ab") as stream:
        stream.write(b"unverified")
    edit(path, lambda content: content["files"][RANKS[0]].update(bytes=size + 10))
    assert f"{RANKS[0]}: its tensors end at byte {size}, the file at {size + 10}" in damage_of(path)


def test_a_tensor_of_another_shape_than_its_file_says_is_found(path: Path):
    def reshape(content: dict[str, Any]) -> None:
        tensor = content["tensors"]["weight/head.norm.weight"]
        tensor["shape"] = [2, 2]
        for number, chunk in enumerate(tensor["chunks"]):
            chunk.update(offset=[number, 0], shape=[1, 2])

    edit(path, reshape)
    assert f"{RANKS[1]} holds no weight/head.norm.weight/0 of shape [1, 2]" in damage_of(path)


@pytest.mark.parametrize("kind", ["hole", "overlap", "moved", "key of nothing", "digest of a chunk"])
def test_a_slice_is_not_read_from_under_an_edited_manifest(path: Path, kind: str):
    edit(path, EDITS[kind][0])
    with pytest.raises(CheckpointError):
        Checkpoint.open(path).read("blocks.0.up.weight", "weight", (0, 0), (5, 3))


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"null", b"[" * 100_000, b'{"digest":"' + b"0" * 64 + b'",}']
)
def test_something_else_in_the_manifests_place_is_refused(path: Path, content: bytes):
    (path / "manifest.json").write_bytes(content)
    assert "manifest.json" in damage_of(path)


def test_a_manifest_that_is_not_an_object_is_refused_in_spite_of_its_digest():
    for rest in (b"{]", b"{" * 10_000):
        digest = hashlib.sha256(rest).hexdigest().encode()
        with pytest.raises(CheckpointError, match="not JSON"):
            Manifest.from_bytes(b'{"digest":"' + digest + b'",' + rest[1:])


def test_opening_a_directory_of_checkpoints_says_which_to_open(path: Path):
    with pytest.raises(CheckpointError) as error:
        Checkpoint.open(path.parent)
    assert str(error.value).endswith(f"It holds checkpoints; the newest of them is {path}.")


def test_opening_nothing_says_so(tmp_path: Path):
    for missing in (tmp_path / "nowhere", "memory://nowhere/at/all", tmp_path / ("x" * 300)):
        with pytest.raises(CheckpointError):
            Checkpoint.open(missing)
