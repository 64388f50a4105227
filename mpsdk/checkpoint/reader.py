"""Reading a checkpoint: any slice of any tensor, every byte of it verified before it is used."""

from __future__ import annotations

import difflib
import threading
from collections import OrderedDict
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from pydantic import JsonValue

from mpsdk.checkpoint.files import Files, read_manifest
from mpsdk.checkpoint.manifest import Chunk, Manifest, StoredTensor
from mpsdk.checkpoint.problems import refuse
from mpsdk.checkpoint.storage import Location, locate
from mpsdk.checkpoint.summary import Summary, summarise
from mpsdk.checkpoint.tiling import Box
from mpsdk.checkpoint.verify import advice, find_damage
from mpsdk.errors import CheckpointError

CHUNKS_KEPT = 4  # verified chunks in memory, since neighbouring slices are read one after the other
CHUNKS_KEPT_AT_MOST = 16  # where a slice lies across so many, as of a tensor that several ranks wrote


class Checkpoint:
    """A complete checkpoint, open for reading. A `TensorSource`: any layout of any framework reads its own slices.

    >>> checkpoint = Checkpoint.open("runs/demo/checkpoints/step-00000100")      # doctest: +SKIP
    >>> checkpoint.read("head.norm.weight", "weight", offset=(0,), shape=(64,))  # doctest: +SKIP

    Opening verifies the manifest; reading verifies the chunks it touches and no others; `verify` checks everything.
    Made by `open`. Threads may read side by side.
    """

    def __init__(self, files: Files) -> None:
        self._files = files
        self._tiled: set[str] = set()
        self._kept: OrderedDict[tuple[str, str], NDArray[np.float32]] = OrderedDict()
        self._lock = threading.Lock()

    @classmethod
    def open(cls, path: Location) -> Checkpoint:
        """Open the checkpoint directory `path`. Raises CheckpointError when its manifest is missing or damaged."""
        storage, directory = locate(path)
        try:
            manifest = read_manifest(storage, directory)
        except CheckpointError as error:
            raise refuse(
                f"checkpoint {storage.address(directory)} cannot be opened",
                [str(error)],
                advice(storage, directory, payload=False),
            ) from None
        return cls(Files(storage, directory, manifest))

    # -- what it holds ----------------------------------------------------------------------------------------------

    @property
    def path(self) -> str:
        """Where it lies; `open` takes it."""
        return self._files.storage.address(self._files.directory)

    @property
    def manifest(self) -> Manifest:
        return self._files.manifest

    @property
    def step(self) -> int:
        return self.manifest.step

    @property
    def samples_consumed(self) -> int:
        return self.manifest.samples_consumed

    @property
    def plan(self) -> Mapping[str, JsonValue]:
        """The plan of the run that wrote it, as JSON data."""
        return self.manifest.plan

    @property
    def scalars(self) -> Mapping[str, float | int]:
        return self.manifest.scalars

    @property
    def slots(self) -> frozenset[str]:
        return frozenset(key.partition("/")[0] for key in self.manifest.tensors)

    def shapes(self, slot: str = "weight") -> dict[str, tuple[int, ...]]:
        """Name and global shape of every tensor that has this slot."""
        parts = ((key.partition("/"), tensor) for key, tensor in self.manifest.tensors.items())
        return {name: tensor.shape for (found, _, name), tensor in parts if found == slot}

    def describe(self) -> Summary:
        """What `mpsdk checkpoint inspect` shows. Reads nothing more."""
        return summarise(self.path, self.manifest)

    # -- reading and verifying --------------------------------------------------------------------------------------

    def read(
        self, name: str, slot: str, offset: tuple[int, ...], shape: tuple[int, ...]
    ) -> NDArray[np.float32]:
        """The slice of `shape` at `offset` of tensor `name`, a new array; a tied tensor reads as its owner.

        Memory: the slice, and a few chunks of 16 MiB.

        Raises:
            CheckpointError: there is no such tensor, the slice is outside of it, or a chunk under it is damaged.
        """
        tensor = self._tensor(name, slot)
        wanted = Box(tuple(offset), tuple(shape))
        if not wanted.fits(tensor.shape):
            raise CheckpointError(
                f"slice {wanted} of {slot}/{name} is outside its shape {list(tensor.shape)} in checkpoint {self.path}"
            )
        values = np.empty(wanted.shape, np.float32)
        under = [(chunk, common) for chunk in tensor.chunks if (common := chunk.box.overlap(wanted))]
        room = max(CHUNKS_KEPT, min(len(under), CHUNKS_KEPT_AT_MOST))
        for chunk, common in under:
            held = self._chunk(chunk, room if common != chunk.box else 0)
            values[common.slices_in(wanted)] = held[common.slices_in(chunk.box)]
        return values

    def verify(self, *, payload: bool = True) -> None:
        """Check every byte, from the disk: manifest, lengths, headers, chunks, tiling, files that do not belong.

        Args:
            payload: False leaves out the tensors' bytes, which is quick for a checkpoint of any size.

        Raises:
            CheckpointError: lists everything that is damaged, and says which older checkpoint is intact.
        """
        storage, directory = self._files.storage, self._files.directory
        _, problems = find_damage(storage, directory, payload=payload)
        if problems:
            raise refuse(
                f"checkpoint {self.path} is damaged", problems, advice(storage, directory, payload=payload)
            )

    def _tensor(self, name: str, slot: str) -> StoredTensor:
        """The tensor, its chunks known to tile it."""
        key = f"{slot}/{self.manifest.tied.get(name, name)}"
        tensor = self.manifest.tensors.get(key)
        if tensor is None:
            if slot in self.slots:
                close = difflib.get_close_matches(name, self.shapes(slot), n=1)
                why = f"it has no tensor {name!r}" + (f", did you mean {close[0]!r}?" if close else "")
                why += f" (its names are {self.manifest.naming})"
            else:
                why = f"it has no slot {slot!r}, only {', '.join(sorted(self.slots))}"
            raise CheckpointError(f"{key} cannot be read from checkpoint {self.path}: {why}")
        if key not in self._tiled:
            if problems := tensor.tiling_problems(key):
                raise self._damaged(problems)
            self._tiled.add(key)
        return tensor

    def _chunk(self, chunk: Chunk, room: int) -> NDArray[np.float32]:
        """A verified chunk, read-only; kept for the next slice, one of `room`, when this one leaves some of it over."""
        place = (chunk.file, chunk.key)
        with self._lock:
            if place in self._kept:
                self._kept.move_to_end(place)
                return self._kept[place]
        try:
            values = self._files.load(chunk)
        except CheckpointError as error:
            raise self._damaged([str(error)]) from None
        if room:
            with self._lock:
                self._kept[place] = values
                while len(self._kept) > room:
                    self._kept.popitem(last=False)
        return values

    def _damaged(self, problems: list[str]) -> CheckpointError:
        storage = self._files.storage
        return refuse(
            f"checkpoint {self.path} is damaged",
            problems,
            advice(storage, self._files.directory, payload=False),
        )
