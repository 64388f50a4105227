"""The manifest: what a checkpoint holds, where every chunk lies, and the digests that all of it must have.

`docs/checkpoint-format.md` is the specification; these models are the same thing in code.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    ValidationError,
    field_validator,
    model_validator,
)

from mpsdk.checkpoint.names import RANK_FILE_PATTERN, tensor_key_problem
from mpsdk.checkpoint.tiling import Box, tiling_faults
from mpsdk.errors import CheckpointError

FORMAT = "mpsdk-checkpoint"
VERSION = 1
ITEM_BYTES = 4  # float32, the one dtype of version 1
LARGEST_HEADER = 100_000_000  # the limit of the safetensors format
LARGEST_MANIFEST = 1 << 30
FAULTS_SHOWN = 3  # holes or overlaps named of one tensor

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
FileName = Annotated[str, Field(pattern=RANK_FILE_PATTERN)]
Size = Annotated[int, Field(ge=0, le=1 << 62)]
Sizes = tuple[Size, ...]
Scalars = dict[str, int | float]


class Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Chunk(Record):
    """A box of one tensor: `key` in the safetensors file `file`, standing at `offset`. `sha256` is that of its bytes."""

    file: FileName
    key: str
    offset: Sizes
    shape: Sizes
    sha256: Digest

    @property
    def box(self) -> Box:
        return Box(self.offset, self.shape)

    @property
    def bytes(self) -> int:
        return ITEM_BYTES * math.prod(self.shape)


class StoredTensor(Record):
    """A whole tensor (or optimizer slot) in global shape, tiled by its chunks."""

    dtype: Literal["float32"]
    shape: Sizes
    chunks: tuple[Chunk, ...]

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    def tiling_problems(self, key: str) -> list[str]:
        """Every hole and overlap of the chunks, with the files that hold the overlapping ones."""
        faults = tiling_faults(self.shape, [chunk.box for chunk in self.chunks])
        problems: list[str] = []
        for fault in faults[:FAULTS_SHOWN]:
            files = sorted({chunk.file for chunk in self.chunks if chunk.box.overlap(fault.box)})
            written = (
                f"is written {fault.times} times, in {', '.join(files)}"
                if fault.times
                else "is written by no rank"
            )
            problems.append(f"{key}, shape {list(self.shape)}: {fault.box} {written}")
        if len(faults) > FAULTS_SHOWN:
            problems.append(f"{key}: {len(faults) - FAULTS_SHOWN} more such places")
        return problems


class StoredFile(Record):
    """A rank's file: its length, the length of the safetensors header with the 8 bytes before it, and their digest."""

    bytes: Size
    header_bytes: Annotated[int, Field(ge=8, le=LARGEST_HEADER + 8)]
    header_sha256: Digest


class Contents(Record):
    """Tensors by `<slot>/<name>` and the files that hold them: of one rank, or of all."""

    tensors: dict[str, StoredTensor]
    files: dict[FileName, StoredFile]
    scalars: Scalars = {}

    @field_validator("scalars")
    @classmethod
    def _finite(cls, scalars: Scalars) -> Scalars:
        for name, value in scalars.items():
            if not math.isfinite(value):
                raise ValueError(f"scalar {name!r} is {value}, and only finite numbers can be saved")
        return scalars

    @model_validator(mode="after")
    def _names_and_boxes(self) -> Contents:
        for key, tensor in self.tensors.items():
            if problem := tensor_key_problem(key):
                raise ValueError(f"tensor {key!r}: {problem}")
            for chunk in tensor.chunks:
                if chunk.file not in self.files:
                    raise ValueError(f"chunk {chunk.key!r} lies in {chunk.file!r}, which is not in files")
                if not chunk.box.fits(tensor.shape):
                    raise ValueError(
                        f"chunk {chunk.key!r} of shape {list(chunk.shape)} at {list(chunk.offset)} is outside the shape "
                        f"{list(tensor.shape)}"
                    )
                number = chunk.key.removeprefix(key + "/")
                if number == chunk.key or not (number.isascii() and number.isdigit()):
                    raise ValueError(f"chunk {chunk.key!r} does not belong to tensor {key!r}")
        return self


class Part(Contents):
    """What one rank wrote, handed to the rank that commits."""

    rank: Annotated[int, Field(ge=0)]


class Meta(Record):
    """What a checkpoint says about the training besides tensors and scalars."""

    step: Size
    samples_consumed: Size
    framework: str  # that wrote it; any can read it
    plan: dict[str, JsonValue]
    plan_hash: str
    seeds: dict[str, int] = {}
    naming: Literal["canonical", "module"] = "canonical"
    tied: dict[str, str] = {}  # name of a tied tensor -> name of its owner, under which alone it is stored


class Manifest(Meta, Contents):
    """Everything that is said of a checkpoint, as it stands in manifest.json."""

    format: Literal["mpsdk-checkpoint"] = FORMAT
    version: Literal[1] = VERSION

    @model_validator(mode="after")
    def _owners(self) -> Manifest:
        for name, owner in self.tied.items():
            if f"weight/{owner}" not in self.tensors or f"weight/{name}" in self.tensors:
                raise ValueError(f"{name!r} is tied to {owner!r}: {owner!r} must be stored, and {name!r} not")
        return self

    def to_bytes(self) -> bytes:
        """The file: canonical JSON (sorted keys, no spaces, ASCII), whose first member is the digest of the rest."""
        rest = canonical_json(self.model_dump(mode="json"))
        digest = hashlib.sha256(rest).hexdigest()
        return b'{"digest":"' + digest.encode() + b'",' + rest[1:]

    @classmethod
    def from_bytes(cls, data: bytes) -> Manifest:
        """Read and check a manifest. Raises CheckpointError that says what is wrong, not where the file is."""
        found = re.match(rb'\{"digest":"([0-9a-f]{64})",', data)
        if not found:
            raise CheckpointError(
                "it does not begin with its digest: it was edited, or damaged, or something else wrote it"
            )
        rest = b"{" + data[found.end() :]
        actual, stated = hashlib.sha256(rest).hexdigest(), found[1].decode()
        if actual != stated:
            raise CheckpointError(
                f"it was edited or damaged: its contents have digest {actual[:16]}…, it states {stated[:16]}…"
            )
        try:
            return cls.model_validate_json(rest)
        except ValidationError as error:
            raise CheckpointError(_reason(rest, error)) from None


def _reason(data: bytes, error: ValidationError) -> str:
    """Why a manifest with the right digest can't be used: another format or version first, else the wrong fields."""
    try:
        value: Any = json.loads(data)
    except (ValueError, RecursionError):
        return "it is not JSON"
    if not isinstance(value, dict):
        return "it is not a JSON object"
    if value.get("format") != FORMAT:  # pyright: ignore[reportUnknownMemberType]
        return f"its format is {value.get('format')!r}, not {FORMAT!r}"  # pyright: ignore[reportUnknownMemberType]
    version: object = value.get("version")  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
    if version != VERSION:
        return f"its format version is {version!r}; this mpsdk reads version {VERSION}: use the mpsdk that wrote it"
    return "; ".join(validation_problems(error))


def validation_problems(error: ValidationError) -> list[str]:
    """What pydantic found, one problem a field."""
    return [
        f"{'.'.join(map(str, item['loc'])) or 'contents'}: {item['msg'].removeprefix('Value error, ')}"
        for item in error.errors(include_url=False, include_input=False)
    ]


def canonical_json(value: object) -> bytes:
    """Sorted keys, no spaces, ASCII only. Raises ValueError for NaN and infinities, which JSON does not have."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")
