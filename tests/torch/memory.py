"""What is alive: every tensor storage that operations make or touch, counted while it lives."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class Living(NamedTuple):
    """A storage that is alive: the operation that made it or used it first, that tensor's shape and dtype, and its bytes."""

    operation: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    bytes: int


class Memory(TorchDispatchMode):
    """Follows the storages of the operations that run inside it; those that existed before are left out on demand.

    Args:
        count_old: whether a storage that an operation only reads is counted too.
        watch_peak: whether to look after every operation; slow.
    """

    def __init__(self, *, count_old: bool = False, watch_peak: bool = False) -> None:
        super().__init__()
        self.count_old, self.watch_peak = count_old, watch_peak
        self.peak = 0
        self.at_peak: list[Living] = []
        self._seen: dict[int, tuple[StorageWeakRef, str, tuple[int, ...], torch.dtype]] = {}
        self._old: dict[int, StorageWeakRef] = {}

    def __torch_dispatch__(
        self,
        func: Any,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # DTensor does it with local tensors, which come here again
        kwargs = kwargs or {}
        self._note(str(func), (args, kwargs), old=not self.count_old)
        result = func(*args, **kwargs)
        self._note(str(func), result, old=False)
        if self.watch_peak:
            alive = self.alive()
            total = sum(living.bytes for living in alive)
            if total > self.peak:
                self.peak, self.at_peak = total, alive
        return result

    def _note(self, operation: str, tensors: Any, *, old: bool) -> None:
        for tensor in tree_iter(tensors):
            if not isinstance(tensor, Tensor) or tensor.is_meta:
                continue
            storage = tensor.untyped_storage()
            key = storage._cdata
            if any(
                key in known and not _reference(known[key]).expired() for known in (self._seen, self._old)
            ):
                continue
            reference = StorageWeakRef(storage)
            if old:
                self._old[key] = reference
            else:
                self._seen[key] = (reference, operation, tuple(tensor.shape), tensor.dtype)

    def alive(self) -> list[Living]:
        """Storages that are alive and not empty, in the order in which they were first seen."""
        found: list[Living] = []
        for key, (reference, operation, shape, dtype) in list(self._seen.items()):
            storage = torch.UntypedStorage._new_with_weak_ptr(reference.cdata)
            if storage is None:
                del self._seen[key]
            elif storage.nbytes():
                found.append(Living(operation, shape, dtype, storage.nbytes()))
        return found

    @property
    def bytes(self) -> int:
        return sum(living.bytes for living in self.alive())


def _reference(entry: Any) -> StorageWeakRef:
    return entry[0] if isinstance(entry, tuple) else entry
