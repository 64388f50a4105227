"""A rank's file: the safetensors format, written front to back and read by ranges.

The safetensors library wants all tensors of a file in memory to write it; this room never holds more than one piece.
The bytes are the same: 8 bytes of header length (little-endian), a JSON header padded with spaces to a multiple of 8,
then the tensors in the header's order without gaps.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

from mpsdk.checkpoint.manifest import ITEM_BYTES, LARGEST_HEADER
from mpsdk.errors import CheckpointError

DTYPE = "F32"
METADATA = "__metadata__"


@dataclass(frozen=True)
class Span:
    """Where a tensor's bytes lie in the file, counted from its first byte, and the tensor's shape."""

    start: int
    end: int
    shape: tuple[int, ...]


def encode_header(
    shapes: Mapping[str, tuple[int, ...]],
    metadata: Mapping[str, str],
    *,
    dtype: str = DTYPE,
    item_bytes: int = ITEM_BYTES,
) -> bytes:
    """The first bytes of a file that holds tensors of these shapes in this order, by default of float32.

    `dtype` is safetensors' name for what the tensors hold, `item_bytes` the size of one element.
    """
    header: dict[str, object] = {METADATA: dict(metadata)}
    position = 0
    for key, shape in shapes.items():
        size = item_bytes
        for dimension in shape:
            size *= dimension
        header[key] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, position + size]}
        position += size
    text = json.dumps(header, separators=(",", ":")).encode("ascii")
    text += b" " * (-len(text) % 8)
    if len(text) > LARGEST_HEADER:
        raise CheckpointError(
            f"a file would need a header of {len(text)} bytes for {len(shapes)} tensors, and safetensors allows "
            f"{LARGEST_HEADER}: spread the tensors over more ranks, or an export's over more files"
        )
    return struct.pack("<Q", len(text)) + text


def decode_header(data: bytes) -> dict[str, Span]:
    """The tensors of a file from its first bytes, in order. Raises ValueError when these are not such a header."""
    if len(data) < 8 or struct.unpack("<Q", data[:8])[0] != len(data) - 8:
        raise ValueError("the header's length is wrong")
    try:
        header = cast("dict[str, dict[str, object]]", json.loads(data[8:]))
        spans: dict[str, Span] = {}
        position = len(data)
        for key, entry in header.items():
            if key == METADATA:
                continue
            shape = tuple(cast("list[int]", entry["shape"]))
            start, end = (len(data) + offset for offset in cast("list[int]", entry["data_offsets"]))
            size = ITEM_BYTES
            for dimension in shape:
                size *= dimension
            if entry["dtype"] != DTYPE or start != position or end - start != size:
                raise ValueError(
                    f"{key!r} is not {DTYPE} of shape {list(shape)} next to the tensor before it"
                )
            spans[key] = Span(start, end, shape)
            position = end
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"the header is not that of a safetensors file ({error!r})") from None
    return spans
