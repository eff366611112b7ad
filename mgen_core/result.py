"""The files of a merge: beside their place under other names until all are durable.

They are written in a folder of their own, `.NAME.TOKEN.tmp`, which is locked as long as somebody
writes in it. So two merges to one file do not meet, and what a killed one has left is known as
such by the next.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, cast

import pyarrow as pa

from . import storage
from .background import Behind
from .errors import RunError
from .objects import ObjectPath
from .stream import Written

FLUSH_BYTES = 1 << 26  # not more of a file waits for the disk at its end
BEHIND_BYTES = 1 << 24  # written, and not yet taken by the disk
BLOCK = 1 << 22


@contextlib.contextmanager
def beside(path: Path, *, digest: bool = False) -> Iterator[Results]:
    """Files that will stand at `path`, or numbered after it; nothing is left when it goes wrong.

    With `digest` they can be checked when they stand there.
    """
    if isinstance(path, ObjectPath):
        with tempfile.TemporaryDirectory(prefix="mgen-", dir=waiting(path)) as folder:
            yield Results(path, Path(folder), digest)
        return
    storage.make_folder(path.parent)
    try:
        sweep(path)
        folder, lock = _own_folder(path)
    except OSError as error:
        raise storage.disk_error(error, path) from error
    try:
        yield Results(path, folder, digest)
    finally:
        os.close(lock)
        with contextlib.suppress(RunError):
            storage.remove(folder)


def waiting(path: Path) -> Path:
    """On which disk the files are until they have their names: what goes to a store is in TMPDIR.

    Raises `RunError` where nothing can be written there.
    """
    try:
        return Path(tempfile.gettempdir()) if isinstance(path, ObjectPath) else path
    except OSError as error:
        what = f"no folder for temporary files: {error.strerror or error}"
        raise RunError(what, "set TMPDIR to a folder with room") from error


class Results:
    """Files that are on their way to their place."""

    def __init__(self, path: Path, folder: Path, digest: bool) -> None:
        self.path = path
        self.folder = folder
        self._digest = digest
        self.written: list[Written] = []

    def add(self, write: storage.Write) -> None:
        """One more file, durable, but not under its name."""
        try:
            stream = _Flushed(self._temporary(len(self.written)), digest=self._digest)
            with io.BufferedWriter(stream, storage.BUFFER) as file:
                behind(cast("BinaryIO", file), write)
            storage.sync(self._temporary(len(self.written)))
        except OSError as error:
            raise self._not_written(error) from error
        self.written.append(stream.written())

    def publish(self, suffix: str, *, numbered: bool) -> list[Path]:
        """Give the files their names: `NAME`, or `NAME-00000-of-00012` before the suffix.

        Of numbered files an earlier set goes first: whoever sees as many as the names say has
        those of one merge.
        """
        paths = numbered_paths(self.path, suffix, len(self.written)) if numbered else [self.path]
        try:
            for old in earlier_set(self.path, suffix) if numbered else ():
                storage.remove(old)
            for number, path in enumerate(paths):
                self._move(self._temporary(number), path)
            if not isinstance(self.path, ObjectPath):
                storage.sync(self.path.parent)
        except OSError as error:
            raise storage.disk_error(error, self.path) from error
        return paths

    def _not_written(self, error: OSError) -> RunError:
        if not isinstance(self.path, ObjectPath):
            return storage.disk_error(error, self.path)
        return RunError(
            f"cannot write {self.folder}, where {self.path} is made before it is sent: "
            f"{error.strerror or error}",
            "make room there, or set TMPDIR to a folder with more room",
        )

    def _temporary(self, number: int) -> Path:
        return self.folder / f"{number:05d}"

    def _move(self, temporary: Path, path: Path) -> None:
        if not isinstance(path, ObjectPath):
            storage.disk.rename(temporary, path)
            return
        with temporary.open("rb") as file:
            storage.write_atomic(path, partial(shutil.copyfileobj, file))


def numbered_paths(path: Path, suffix: str, count: int) -> list[Path]:
    """`out.parquet` -> `out-00000-of-00002.parquet`, `out-00001-of-00002.parquet`."""
    stem, end = _split(path, suffix)
    return [path.with_name(f"{stem}-{n:05d}-of-{count:05d}{end}") for n in range(count)]


def earlier_set(path: Path, suffix: str) -> list[Path]:
    """Numbered files of this name that are there already."""
    stem, end = _split(path, suffix)
    named = re.compile(rf"{re.escape(stem)}-\d{{5,}}-of-\d{{5,}}{re.escape(end)}")
    return [found for found in path.parent.iterdir() if named.fullmatch(found.name)]


def check(path: Path, written: Written) -> None:
    """Read a file back. Raises `RunError` when it is not what was written."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        if not isinstance(path, ObjectPath) and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # from the disk itself
        while block := file.read(BLOCK):
            digest.update(block)
    if digest.hexdigest() != written.sha256:
        raise RunError(f"{path} does not read back as it was written", "check the disk")


def behind(file: BinaryIO, write: storage.Write) -> None:
    """Call `write` with a file whose bytes another thread hands to the disk."""

    def put(blocks: Sequence[memoryview]) -> None:
        for block in blocks:
            file.write(block)

    with Behind(put, room=BEHIND_BYTES) as thread, _Queued(thread) as queued:
        write(cast("BinaryIO", queued))


class _Queued(io.RawIOBase):
    """Large buffers of Arrow, in which nobody writes, are handed on; all else is copied."""

    def __init__(self, thread: Behind[memoryview]) -> None:
        self._thread = thread
        self._held = bytearray()
        self._bytes = 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        self._bytes += len(view)
        if isinstance(view.obj, pa.Buffer) and len(view) >= storage.BUFFER:
            self.flush()
            self._thread.put(view, len(view))
        else:
            self._held += view
            if len(self._held) >= storage.BUFFER:
                self.flush()
        return len(view)

    def flush(self) -> None:
        if self._held:
            held, self._held = self._held, bytearray()
            self._thread.put(memoryview(held), len(held))

    def tell(self) -> int:
        return self._bytes


class _Flushed(storage.DiskFile):
    """Goes to the disk as it is written, so that its end does not wait for all of it."""

    def __init__(self, path: Path, *, digest: bool) -> None:
        super().__init__(path, digest=digest)
        self._waiting = 0
        self._syncer = ThreadPoolExecutor(1, "mgen-sync")
        self._syncing: Future[None] | None = None

    def take(self, view: memoryview) -> int:
        taken = super().take(view)
        self._waiting += taken
        if self._waiting >= FLUSH_BYTES:
            self._synced()
            self._syncing = self._syncer.submit(storage.disk.sync, self._descriptor)
            self._waiting = 0
        return taken

    def _synced(self) -> None:
        syncing, self._syncing = self._syncing, None
        if syncing is not None:
            syncing.result()

    def close(self) -> None:
        self._syncer.shutdown()
        super().close()
        self._synced()


def _own_folder(path: Path) -> tuple[Path, int]:
    """A new folder beside the path, and the descriptor that holds its lock."""
    while True:
        token = secrets.token_hex(4)
        folder = path.with_name(f".{path.name}.{token}{storage.TEMPORARY}")
        storage.disk.make_folder(folder)
        lock = os.open(folder, os.O_RDONLY)
        with contextlib.suppress(OSError):  # a disk without locks: nobody sweeps there
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if folder.exists():  # else another merge took it for one that was left
            return folder, lock
        os.close(lock)


def sweep(path: Path) -> None:
    """Remove the folders that killed merges to this path have left."""
    if isinstance(path, ObjectPath):
        return
    named = re.compile(rf"\.{re.escape(path.name)}\.[0-9a-f]{{8}}{re.escape(storage.TEMPORARY)}")
    for folder in path.parent.iterdir():
        if not named.fullmatch(folder.name):
            continue
        with contextlib.suppress(OSError):  # gone, or somebody writes in it
            lock = os.open(folder, os.O_RDONLY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                storage.remove(folder)
            finally:
                os.close(lock)


def _split(path: Path, suffix: str) -> tuple[str, str]:
    """A file's name without its suffix, and that; the writer's suffix where it is of that kind."""
    if path.name.lower().endswith(suffix):
        return path.name[: -len(suffix)], path.name[-len(suffix) :]
    return path.stem, path.suffix
