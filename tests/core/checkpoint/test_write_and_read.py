"""What is written is what is read: any cut, any slice, any storage; and only what is needed is read."""

from __future__ import annotations

import itertools
import json
import tempfile
import tracemalloc
import uuid
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from mpsdk.backend import RankState, Shard, TensorSource
from mpsdk.checkpoint import Checkpoint, commit, find, step_directory, write_rank
from mpsdk.checkpoint.storage import LocalStorage
from mpsdk.checkpoint.writer import CHUNK_BYTES
from mpsdk.errors import CheckpointError
from tests.core.checkpoint.samples import SCALARS, meta, row_shards, save, shard, tensors, write_parts


@pytest.fixture(params=["local", "remote"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path) if request.param == "local" else f"memory://{uuid.uuid4().hex}/runs"


def whole(checkpoint: Checkpoint, name: str, slot: str) -> np.ndarray:
    shape = checkpoint.shapes(slot)[name]
    return checkpoint.read(name, slot, (0,) * len(shape), shape)


def test_a_checkpoint_gives_back_every_tensor_bit_for_bit(root: str):
    contents = tensors()
    contents["extremes", "weight"] = np.array([np.nan, np.inf, -0.0, 1e-45, 3.4e38], np.float32)
    checkpoint = Checkpoint.open(save(root, 100, contents))
    checkpoint.verify()
    for (name, slot), values in contents.items():
        assert whole(checkpoint, name, slot).tobytes() == values.tobytes()


def test_a_checkpoint_says_what_it_is(root: str):
    checkpoint = Checkpoint.open(save(root, 100))
    assert isinstance(checkpoint, TensorSource)
    assert checkpoint.step == 100 and checkpoint.samples_consumed == 800
    assert checkpoint.slots == {"weight", "exp_avg", "exp_avg_sq"}
    assert checkpoint.scalars == SCALARS and isinstance(checkpoint.scalars["optimizer_step"], int)
    assert checkpoint.plan == {"degrees": [1, 1, 2, 1, 1], "world_size": 2}
    assert Checkpoint.open(checkpoint.path).manifest == checkpoint.manifest
    assert [Checkpoint.open(path).step for path in find(root)] == [100]


def test_the_summary_counts_parameters_and_names_the_layout(tmp_path: Path):
    summary = Checkpoint.open(save(tmp_path, 100)).describe()
    assert summary.parameters == 5 * 3 + 4 + 1
    assert summary.tensors == 3 and summary.files == 2 and summary.world_size == 2
    assert summary.layout == {"pp": 1, "dp": 1, "sdp": 2, "cp": 1, "tp": 1}
    sizes = [file.stat().st_size for file in (tmp_path / "step-00000100").glob("*.safetensors")]
    assert summary.bytes == sum(sizes)
    assert "sdp 2" in str(summary) and "20 parameters" in str(summary)
    assert type(summary).model_validate_json(summary.model_dump_json()) == summary


@st.composite
def cut(draw: st.DrawFn) -> tuple[tuple[int, ...], list[tuple[slice, ...]], list[int]]:
    """A shape, a grid of boxes that tile it, and the rank that each box goes to."""
    shape = tuple(draw(st.lists(st.integers(0, 7), min_size=0, max_size=3)))
    boxes: list[tuple[slice, ...]] = [()]
    for size in shape:
        edges = sorted({0, size, *draw(st.lists(st.integers(0, size), max_size=3))})
        spans = [slice(start, stop) for start, stop in itertools.pairwise(edges)] or [slice(0, 0)]
        boxes = [(*box, span) for box in boxes for span in spans]
    owners = [draw(st.integers(0, 2)) for _ in boxes]
    return shape, boxes, owners


@settings(max_examples=40, deadline=None)
@given(cut(), st.data())
def test_any_cut_over_ranks_gives_any_slice(
    case: tuple[tuple[int, ...], list[tuple[slice, ...]], list[int]], data: st.DataObject
):
    shape, boxes, owners = case
    values = np.random.default_rng(len(boxes)).normal(size=shape).astype(np.float32).reshape(shape)
    shards: list[list[Shard]] = [[], [], []]
    for box, owner in zip(boxes, owners, strict=True):
        shards[owner].append(shard("a.b", "weight", values, box))
    with tempfile.TemporaryDirectory() as root:
        tmp, final = step_directory(root, 1, 0), step_directory(root, 1)
        commit(tmp, final, write_parts(tmp, shards), meta(1))
        checkpoint = Checkpoint.open(final)
        checkpoint.verify()
        for _ in range(4):
            offset = tuple(data.draw(st.integers(0, size)) for size in shape)
            extent = tuple(
                data.draw(st.integers(0, size - start)) for size, start in zip(shape, offset, strict=True)
            )
            expected = values[
                tuple(slice(start, start + size) for start, size in zip(offset, extent, strict=True))
            ]
            np.testing.assert_array_equal(checkpoint.read("a.b", "weight", offset, extent), expected)


def test_the_safetensors_library_reads_the_files_under_the_keys_of_the_manifest(tmp_path: Path):
    contents = tensors()
    path = Path(save(tmp_path, 3, contents))
    manifest = json.loads((path / "manifest.json").read_text())
    for key, tensor in manifest["tensors"].items():
        slot, _, name = key.partition("/")
        values = np.full(tensor["shape"], np.nan, np.float32)
        for chunk in tensor["chunks"]:
            box = tuple(
                slice(start, start + size)
                for start, size in zip(chunk["offset"], chunk["shape"], strict=True)
            )
            values[box] = load_file(path / chunk["file"])[chunk["key"]]
        np.testing.assert_array_equal(values, contents[name, slot])


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, np.ndarray]:
    """A tensor of 40 MiB on one rank."""
    values = np.arange(10 * 1024 * 1024, dtype=np.float32).reshape(10240, 1024)
    return save(tmp_path_factory.mktemp("large"), 1, {("wide", "weight"): values}, ranks=1), values


def test_chunks_are_runs_of_rows_of_at_most_16_mib(large: tuple[str, np.ndarray]):
    chunks = Checkpoint.open(large[0]).manifest.tensors["weight/wide"].chunks
    assert [chunk.offset for chunk in chunks] == [(0, 0), (4096, 0), (8192, 0)]
    assert max(chunk.bytes for chunk in chunks) == CHUNK_BYTES == 16 * 1024 * 1024


def test_a_slice_reads_only_the_chunks_under_it(
    large: tuple[str, np.ndarray], monkeypatch: pytest.MonkeyPatch
):
    path, values = large
    checkpoint = Checkpoint.open(path)
    reads: list[int] = []
    original = LocalStorage.read

    def counted(self: LocalStorage, path: str, start: int, length: int) -> bytes | bytearray:
        reads.append(length)
        return original(self, path, start, length)

    monkeypatch.setattr(LocalStorage, "read", counted)
    np.testing.assert_array_equal(
        checkpoint.read("wide", "weight", (5000, 10), (20, 4)), values[5000:5020, 10:14]
    )
    header = checkpoint.manifest.files["rank-00000.safetensors"].header_bytes
    assert reads == [header, CHUNK_BYTES]
    checkpoint.read("wide", "weight", (5020, 0), (20, 4))
    assert len(reads) == 2, "the neighbouring slice comes from the chunk that is already verified"


def test_reading_a_whole_tensor_needs_little_more_memory_than_the_tensor(large: tuple[str, np.ndarray]):
    path, values = large
    checkpoint = Checkpoint.open(path)
    tracemalloc.start()
    try:
        checkpoint.read("wide", "weight", (0, 0), values.shape)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < values.nbytes + 2.5 * CHUNK_BYTES


def test_writing_holds_one_shard_at_a_time(tmp_path: Path):
    rows, alive = 1024, 1024 * 1024 * 4
    shards = [
        Shard(
            f"t{i}", "weight", (rows, 1024), (0, 0), (rows, 1024), lambda: np.ones((rows, 1024), np.float32)
        )
        for i in range(6)
    ]
    tracemalloc.start()
    try:
        write_rank(step_directory(tmp_path, 1, 0), 0, RankState(shards, {}))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2.5 * alive


def test_a_tied_tensor_is_stored_once_and_reads_under_both_names(tmp_path: Path):
    contents = {("embedding.tokens.weight", "weight"): np.ones((4, 2), np.float32)}
    tied = {"head.output.weight": "embedding.tokens.weight"}
    checkpoint = Checkpoint.open(save(tmp_path, 1, contents, tied=tied))
    assert list(checkpoint.shapes()) == ["embedding.tokens.weight"]
    np.testing.assert_array_equal(
        checkpoint.read("head.output.weight", "weight", (1, 0), (2, 2)), np.ones((2, 2))
    )


def test_a_tensor_without_elements_and_a_rank_without_tensors_are_fine(tmp_path: Path):
    contents = {("empty", "weight"): np.zeros((0, 3), np.float32), ("one", "weight"): np.ones(1, np.float32)}
    checkpoint = Checkpoint.open(save(tmp_path, 1, contents, ranks=3))
    checkpoint.verify()
    assert checkpoint.read("empty", "weight", (0, 1), (0, 2)).shape == (0, 2)
    assert len(checkpoint.manifest.files) == 1


@pytest.mark.parametrize(
    ("name", "slot", "offset", "shape", "said"),
    [
        ("blocks.0.up.wieght", "weight", (0, 0), (1, 1), "did you mean 'blocks.0.up.weight'"),
        ("head.norm.weight", "exp_avg", (0,), (1,), "no tensor 'head.norm.weight'"),
        ("head.norm.weight", "momentum", (0,), (1,), "only exp_avg, exp_avg_sq, weight"),
        (
            "head.norm.weight",
            "weight",
            (2,),
            (3,),
            "[2:5] of weight/head.norm.weight is outside its shape [4]",
        ),
        ("head.norm.weight", "weight", (0, 0), (1, 1), "is outside its shape [4]"),
        ("head.norm.weight", "weight", (-1,), (1,), "is outside its shape [4]"),
    ],
)
def test_what_cannot_be_read_is_said(
    tmp_path: Path, name: str, slot: str, offset: tuple[int, ...], shape: tuple[int, ...], said: str
):
    checkpoint = Checkpoint.open(save(tmp_path, 1))
    with pytest.raises(CheckpointError) as error:
        checkpoint.read(name, slot, offset, shape)
    assert said in str(error.value)


def test_a_later_save_of_the_same_step_replaces_the_earlier(root: str):
    save(root, 5, tensors(1), generation=1)
    path = save(root, 5, tensors(2), generation=2)
    assert len(find(root)) == 1
    np.testing.assert_array_equal(
        whole(Checkpoint.open(path), "head.norm.weight", "weight"), tensors(2)["head.norm.weight", "weight"]
    )


def test_nothing_but_the_checkpoint_is_left_under_the_root(tmp_path: Path):
    save(tmp_path, 5)
    save(tmp_path, 5, generation=2)
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == [
        "step-00000005",
        "step-00000005/manifest.json",
        "step-00000005/rank-00000.safetensors",
        "step-00000005/rank-00001.safetensors",
    ]


def test_shards_are_read_in_order_and_only_once(tmp_path: Path):
    contents = tensors()
    seen: list[str] = []

    def noted(piece: Shard) -> Shard:
        def read() -> np.ndarray:
            seen.append(f"{piece.slot}/{piece.name}")
            return piece.read()

        return Shard(piece.name, piece.slot, piece.global_shape, piece.offset, piece.shape, read)

    (shards,) = row_shards(contents, 1)
    write_rank(step_directory(tmp_path, 1, 0), 0, RankState((noted(piece) for piece in shards), {}))
    assert seen == [f"{slot}/{name}" for name, slot in contents]
