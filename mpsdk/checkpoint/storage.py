"""Where checkpoints lie: a local directory, or anything that fsspec reaches (`s3://`, `gs://`, `memory://`, ...).

The few operations that the checkpoint format needs, with what it relies on: a created file is on disk when `create`
returns, `move` makes a whole directory appear with its manifest last, a removed directory loses its manifest first.
Symbolic links are never followed below a checkpoint's directory, so that no name can lead out of it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import IO, Any, Literal, Protocol, cast

from mpsdk.errors import CheckpointError

MANIFEST_FILE = "manifest.json"
COPIES_AT_ONCE = 8
REMOVED = ".tmp-removed"

Location = str | os.PathLike[str]


@dataclass(frozen=True)
class Entry:
    """One name in a directory. `bytes` is 0 for what is not a file."""

    kind: Literal["file", "directory", "other"]
    bytes: int


class Storage(Protocol):
    """Operations on absolute paths of one storage system. They raise OSError."""

    def join(self, directory: str, name: str) -> str: ...

    def parent(self, path: str) -> str: ...

    def name(self, path: str) -> str: ...

    def address(self, path: str) -> str:
        """What `locate` finds `path` by."""
        ...

    def entries(self, directory: str) -> dict[str, Entry]:
        """Names in `directory`; empty when there is no such directory."""
        ...

    def entry(self, path: str) -> Entry | None:
        """What `path` is; None when it is nothing. (Some stores have no empty directories.)"""
        ...

    def read(self, path: str, start: int, length: int) -> bytes | bytearray:
        """At most `length` bytes from `start`; fewer where the file ends before."""
        ...

    def create(self, path: str) -> AbstractContextManager[IO[bytes]]:
        """A new file, replacing an old one; durable after the `with` block, gone if an exception ends it."""
        ...

    def make_directory(self, path: str) -> None: ...

    def move(self, source: str, target: str) -> None:
        """Move a directory to `target`, which must not exist. A reader sees the target's manifest last."""
        ...

    def remove_directory(self, path: str) -> None:
        """Remove a directory and what is in it. A reader stops seeing its manifest first."""
        ...


def is_remote(path: Location) -> bool:
    """Whether fsspec is to reach `path`, and not the operating system."""
    text = os.fspath(path)
    return "://" in text and not text.startswith(("file://", "local://"))


def locate(path: Location, *, follow: bool = True) -> tuple[Storage, str]:
    """The storage that `path` lies on, and the absolute path there, symbolic links resolved.

    With `follow=False` the last name is kept as it is, for a path that is about to be made.
    Raises CheckpointError for a path that no storage can have.
    """
    text = os.fspath(path)
    if not text or "\0" in text:
        raise CheckpointError(f"{text!r} is not a path that a checkpoint can have")
    if not is_remote(path):
        local = os.path.abspath(os.path.expanduser(text.partition("://")[2] if "://" in text else text))
        if follow:
            return LocalStorage(), os.path.realpath(local)
        return LocalStorage(), os.path.join(os.path.realpath(os.path.dirname(local)), os.path.basename(local))
    from fsspec.core import url_to_fs  # pyright: ignore[reportMissingTypeStubs, reportUnknownVariableType]

    try:
        system, remote = cast("tuple[RemoteSystem, str]", url_to_fs(text))
    except (ValueError, ImportError) as error:
        raise CheckpointError(f"{text!r} cannot be reached: {error}") from error
    if ".." in remote.split("/"):
        raise CheckpointError(f"{text!r} leads out of itself by '..'")
    remote = remote.rstrip("/")
    head = text.rstrip("/").removesuffix(remote)
    prefix = head if head + remote == text.rstrip("/") else system.unstrip_protocol("")
    return RemoteStorage(system, prefix), remote


class LocalStorage:
    """Files of this machine (or of a mounted file system), made durable by fsync and committed by rename."""

    def join(self, directory: str, name: str) -> str:
        return os.path.join(directory, name)

    def parent(self, path: str) -> str:
        return os.path.dirname(path)

    def name(self, path: str) -> str:
        return os.path.basename(path)

    def address(self, path: str) -> str:
        return path

    def entries(self, directory: str) -> dict[str, Entry]:
        found: dict[str, Entry] = {}
        try:
            with os.scandir(directory) as names:
                for name in names:
                    with contextlib.suppress(FileNotFoundError):  # removed or renamed since it was listed
                        found[name.name] = _entry(name.stat(follow_symlinks=False))
        except (FileNotFoundError, NotADirectoryError):
            return {}
        return found

    def entry(self, path: str) -> Entry | None:
        try:
            return _entry(os.lstat(path))
        except (FileNotFoundError, NotADirectoryError):
            return None

    def read(self, path: str, start: int, length: int) -> bytes | bytearray:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        with open(descriptor, "rb", buffering=0) as file:
            file.seek(start)
            data = bytearray(min(length, max(0, os.fstat(descriptor).st_size - start)))
            position = 0
            while position < len(data):  # one read gives at most 2 GiB, and fewer at a signal
                count = file.readinto(memoryview(data)[position:])
                if not count:
                    return data[:position]
                position += count
        return data

    @contextlib.contextmanager
    def create(self, path: str) -> Generator[IO[bytes]]:
        # Unlink, then O_EXCL: what is planted under this name (a link out of the directory, say) is never written through.
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        try:
            with open(descriptor, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            _sync_directory(os.path.dirname(path))
        except Exception:
            with contextlib.suppress(OSError):
                os.unlink(path)
            raise

    def make_directory(self, path: str) -> None:
        parents = [os.path.dirname(path)]
        while not os.path.isdir(parents[-1]):
            parents.append(os.path.dirname(parents[-1]))
        os.makedirs(path, exist_ok=True)
        for parent in parents:
            _sync_directory(parent)

    def move(self, source: str, target: str) -> None:
        _sync_directory(source)
        os.rename(source, target)
        _sync_directory(os.path.dirname(target))

    def remove_directory(self, path: str) -> None:
        if not path.endswith(REMOVED):
            doomed = path + REMOVED
            if os.path.lexists(doomed):
                shutil.rmtree(doomed)
            os.rename(path, doomed)  # at once invisible to readers, however long the removal takes
            path = doomed
        shutil.rmtree(path)


def _entry(status: os.stat_result) -> Entry:
    if stat.S_ISREG(status.st_mode):
        return Entry("file", status.st_size)
    return Entry("directory" if stat.S_ISDIR(status.st_mode) else "other", 0)


def _sync_directory(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems sync no directories
            raise
    finally:
        os.close(descriptor)


class RemoteSystem(Protocol):
    """What is used of an fsspec file system."""

    def unstrip_protocol(self, name: str) -> str: ...
    def invalidate_cache(self, path: str | None = None) -> None: ...
    def ls(self, path: str, detail: bool = True) -> list[dict[str, Any]]: ...
    def info(self, path: str) -> dict[str, Any]: ...
    def cat_file(self, path: str, start: int | None = None, end: int | None = None) -> bytes: ...
    def open(self, path: str, mode: str) -> IO[bytes]: ...
    def makedirs(self, path: str, exist_ok: bool = False) -> None: ...
    def cp_file(self, path1: str, path2: str) -> None: ...
    def rm_file(self, path: str) -> None: ...
    def rm(self, path: str, recursive: bool = False) -> None: ...


class RemoteStorage:
    """A store without an atomic rename: a checkpoint is there from the moment that its manifest is, which comes last."""

    def __init__(self, system: RemoteSystem, prefix: str) -> None:
        """`prefix` goes before a path to make it an address: the protocol, with the host where there is one."""
        self.system = system
        self.prefix = prefix

    def join(self, directory: str, name: str) -> str:
        return f"{directory}/{name}"

    def parent(self, path: str) -> str:
        return path.rpartition("/")[0]

    def name(self, path: str) -> str:
        return path.rpartition("/")[2]

    def address(self, path: str) -> str:
        return self.prefix + path

    def entries(self, directory: str) -> dict[str, Entry]:
        self.system.invalidate_cache(directory)
        try:
            listing = self.system.ls(directory, detail=True)
        except (FileNotFoundError, NotADirectoryError):
            return {}
        found: dict[str, Entry] = {}
        for item in listing:
            path = str(item["name"]).rstrip("/")
            if path == directory.rstrip("/"):  # some stores list a directory's own marker
                continue
            found[path.rpartition("/")[2]] = self._entry(item)
        return found

    def entry(self, path: str) -> Entry | None:
        self.system.invalidate_cache(self.parent(path))
        try:
            return self._entry(self.system.info(path))
        except (FileNotFoundError, NotADirectoryError):
            return None

    def _entry(self, item: dict[str, Any]) -> Entry:
        if item["type"] == "file":
            return Entry("file", int(item["size"] or 0))
        return Entry("directory", 0)

    def read(self, path: str, start: int, length: int) -> bytes | bytearray:
        return self.system.cat_file(path, start=start, end=start + length)

    @contextlib.contextmanager
    def create(self, path: str) -> Generator[IO[bytes]]:
        try:
            with self.system.open(path, "wb") as file:
                yield file
        except Exception:
            with contextlib.suppress(OSError):
                self.system.rm_file(path)
            raise

    def make_directory(self, path: str) -> None:
        self.system.makedirs(path, exist_ok=True)

    def move(self, source: str, target: str) -> None:
        names = self.entries(source)
        self.make_directory(target)

        def copy(name: str) -> None:
            self.system.cp_file(self.join(source, name), self.join(target, name))

        with ThreadPoolExecutor(COPIES_AT_ONCE) as pool:
            list(pool.map(copy, (name for name in names if name != MANIFEST_FILE)))
        if MANIFEST_FILE in names:
            copy(MANIFEST_FILE)
        self.remove_directory(source)

    def remove_directory(self, path: str) -> None:
        if MANIFEST_FILE in self.entries(path):
            self.system.rm_file(self.join(path, MANIFEST_FILE))
        with contextlib.suppress(FileNotFoundError):  # object stores have no empty directories
            self.system.rm(path, recursive=True)
