"""The header of a rank's file: what the safetensors library would write and read, and nothing looser."""

from __future__ import annotations

import json
import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load

from mpsdk.checkpoint import container
from mpsdk.checkpoint.container import decode_header, encode_header
from mpsdk.errors import CheckpointError

shapes = st.dictionaries(
    st.text(st.characters(categories=("L", "N", "P")), min_size=1).filter(lambda key: key != "__metadata__"),
    st.lists(st.integers(0, 5), max_size=3).map(tuple),
    max_size=5,
)


@given(shapes)
def test_the_safetensors_library_reads_what_is_encoded(shapes: dict[str, tuple[int, ...]]):
    header = encode_header(shapes, {"rank": "3"})
    assert len(header) % 8 == 0
    arrays = [np.full(shape, number, np.float32) for number, shape in enumerate(shapes.values())]
    data = header + b"".join(array.tobytes() for array in arrays)
    read = load(data)
    assert {key: value.shape for key, value in read.items()} == shapes
    for (key, span), array in zip(decode_header(header).items(), arrays, strict=True):
        np.testing.assert_array_equal(read[key], array)
        assert data[span.start : span.end] == array.tobytes() and span.shape == array.shape


def header_of(**tensors: Any) -> bytes:
    text = json.dumps(tensors).encode()
    return struct.pack("<Q", len(text)) + text


ONE = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0" * 7,
        header_of(a=ONE)[:-1],
        header_of(a=ONE) + b" ",
        struct.pack("<Q", 2) + b"{]",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 100_000) + b"[" * 100_000,
        header_of(a=1),
        header_of(a={"dtype": "F32", "shape": [1]}),
        header_of(a={**ONE, "dtype": "BF16"}),
        header_of(a={**ONE, "shape": [2]}),
        header_of(a={**ONE, "shape": None}),
        header_of(a={**ONE, "data_offsets": [0]}),
        header_of(a={**ONE, "data_offsets": [4, 8]}),
        header_of(a=ONE, b=ONE),
        header_of(a=ONE, b={**ONE, "data_offsets": [8, 12]}),
    ],
)
def test_any_other_header_is_refused(data: bytes):
    with pytest.raises(ValueError):
        decode_header(data)


def test_a_header_beyond_the_limit_of_the_format_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(container, "LARGEST_HEADER", 100)
    with pytest.raises(CheckpointError, match="safetensors allows 100: spread the tensors over more ranks"):
        encode_header({f"weight/{number}/0": (1,) for number in range(10)}, {})
