"""The documented format is the written one: the reader in docs/checkpoint-format.md knows nothing of mpsdk."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mpsdk.checkpoint import Manifest
from mpsdk.checkpoint.manifest import Chunk, StoredFile, StoredTensor
from tests.core.checkpoint.samples import save, tensors

DOCUMENT = (Path(__file__).parents[3] / "docs" / "checkpoint-format.md").read_text()


@pytest.fixture(scope="module")
def documented_reader() -> Callable[[str, str], np.ndarray]:
    (code,) = re.findall(r"```python\n(.*?)```", DOCUMENT, re.DOTALL)
    namespace: dict[str, Callable[[str, str], np.ndarray]] = {}
    exec(code, namespace)
    return namespace["read_tensor"]


def test_the_documented_reader_reads_what_is_written(
    tmp_path: Path, documented_reader: Callable[[str, str], np.ndarray]
):
    path = save(tmp_path, 20)
    for (name, slot), values in tensors(20).items():
        np.testing.assert_array_equal(documented_reader(path, f"{slot}/{name}"), values)


def test_the_documented_reader_finds_a_damaged_chunk(
    tmp_path: Path, documented_reader: Callable[[str, str], np.ndarray]
):
    path = Path(save(tmp_path, 20))
    file = path / "rank-00000.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    with pytest.raises(AssertionError):
        documented_reader(str(path), "weight/temperature")


def test_the_document_names_every_member():
    (table,) = re.findall(r"\| member \| type \| meaning \|\n\|---\|---\|---\|\n((?:\|.*\n)+)", DOCUMENT)
    documented = re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)
    assert documented == sorted(["digest", *Manifest.model_fields])
    for model in (Chunk, StoredFile, StoredTensor):
        for member in model.model_fields:
            assert f"`{member}`" in DOCUMENT


def test_the_manifest_is_canonical_json_behind_its_digest(tmp_path: Path):
    data = (
        Path(save(tmp_path, 20, plan={"name": "größe", "digest": "of the plan"})) / "manifest.json"
    ).read_bytes()
    content = json.loads(data)
    stated = content.pop("digest")
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
    assert hashlib.sha256(canonical.encode()).hexdigest() == stated
    assert data == b'{"digest":"' + stated.encode() + b'",' + canonical[1:].encode()
    assert Manifest.from_bytes(data).to_bytes() == data
