"""Every call that changes a disk or a store: atomic files, append-only logs, the lock.

A file appears under its name only when it is complete and durable: it is written beside it,
fsynced, renamed, and the folder is fsynced. Nothing else in mgen writes, renames or deletes, and
here all of it goes through `disk`, or for a URL through `upload`.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import io
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, BinaryIO, Protocol, cast

from . import lease, objects, upload
from .errors import RunError
from .objects import ObjectPath
from .stream import Stream, Written

TEMPORARY = ".tmp"
SYNCERS = 16
BUFFER = 1 << 20
PIECE = 1 << 18  # bytes of a write: ext4 takes larger ones at a third of the speed


class Disk:
    """The system calls that change a disk. Tests put another in its place: one that fails."""

    def open(self, path: Path, flags: int) -> int:
        return os.open(path, flags | os.O_CLOEXEC, 0o666)

    def write(self, descriptor: int, data: Any) -> int:
        return os.write(descriptor, data)

    def truncate(self, descriptor: int, length: int) -> None:
        os.ftruncate(descriptor, length)

    def sync(self, descriptor: int) -> None:
        os.fsync(descriptor)

    def close(self, descriptor: int) -> None:
        os.close(descriptor)

    def rename(self, old: Path, new: Path) -> None:
        os.replace(old, new)

    def remove(self, path: Path) -> None:
        os.unlink(path)

    def make_folder(self, path: Path) -> None:
        os.mkdir(path)

    def remove_folder(self, path: Path) -> None:
        os.rmdir(path)


disk = Disk()

Write = Callable[[BinaryIO], object]
"""Writes a file that is handed to it, from its start to its end."""


class DiskFile(Stream):
    """A new file on a disk."""

    def __init__(self, path: Path, *, digest: bool = True) -> None:
        super().__init__(digest=digest)
        self._descriptor = disk.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)

    def take(self, view: memoryview) -> int:
        return disk.write(self._descriptor, view[:PIECE])

    def close(self) -> None:
        if not self.closed:
            super().close()
            disk.close(self._descriptor)


def make_folder(path: Path) -> list[Path]:
    """The folder and its parents, durable; gives those that were not there, innermost first.

    A store has none to make. Raises `RunError` where it cannot be.
    """
    if isinstance(path, ObjectPath):
        return []
    try:
        new = [folder for folder in (path, *path.parents) if not folder.exists()]
        for folder in reversed(new):
            with contextlib.suppress(FileExistsError):  # another rank makes it too
                disk.make_folder(folder)
            sync(folder.parent)
        if not path.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
    except OSError as error:
        raise disk_error(error, path) from error
    return new


def write_atomic(path: Path, write: Write) -> Written:
    """Call `write` with a new file, then give it its name, durably."""
    return write_all({path: write})[path]


def write_all(files: Mapping[Path, Write]) -> dict[Path, Written]:
    """`write_atomic` of several files: on return all are durable under their names.

    Files are synced side by side, which a disk does in little more time than it takes for one.
    """
    if isinstance(path := next(iter(files)), ObjectPath):
        lease.check(path)
        return cast("Any", upload.put_all(cast("Any", files)))
    temporaries = {path: path.with_name(f".{path.name}{TEMPORARY}") for path in files}
    try:
        written = {}
        for path, write in files.items():
            written[path] = _write(temporaries[path], write)
        with ThreadPoolExecutor(SYNCERS) as pool:
            list(pool.map(sync, temporaries.values()))
        for path, temporary in temporaries.items():
            disk.rename(temporary, path)
        for folder in {path.parent for path in files}:
            sync(folder)
    except BaseException as error:
        for temporary in temporaries.values():
            _forget(temporary)
        if isinstance(error, OSError):
            raise disk_error(error, path) from error
        raise
    return written


def write_text(path: Path, text: str) -> None:
    """A whole text file, atomically."""
    write_atomic(path, lambda file: file.write(text.encode()))


def append_lines(path: Path, lines: Sequence[str]) -> None:
    """Durable lines at the end of a log; a line that was torn by a crash is cut off first.

    On a store they are a file of their own beside it.
    """
    if isinstance(path, ObjectPath):
        lease.check(path)
        upload.put_lines(path, lines)
        return
    left = memoryview("".join(f"{line}\n" for line in lines).encode())
    try:
        new = not path.exists()
        descriptor = disk.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND)
        try:
            _drop_torn_line(descriptor)
            while left:
                left = left[disk.write(descriptor, left) :]
            disk.sync(descriptor)
        finally:
            disk.close(descriptor)
        if new:
            sync(path.parent)
    except OSError as error:
        raise disk_error(error, path) from error


def new_lines(folder: Path, pattern: str) -> Iterator[list[str]]:
    """At each step, the whole lines that came to the logs since the one before, in their order."""
    if isinstance(folder, ObjectPath):
        for found in objects.new_files(folder, pattern):
            yield [line for log in found for line in log.decode(errors="replace").splitlines()]
    read: dict[Path, int] = {}
    while True:
        lines: list[str] = []
        for log in sorted(folder.glob(pattern)):
            with open(log, "rb") as file:
                file.seek(read.get(log, 0))
                whole, newline, _ = file.read().rpartition(b"\n")
            read[log] = read.get(log, 0) + len(whole) + len(newline)
            lines += whole.decode(errors="replace").splitlines()
        yield lines


def sizes(folder: Path) -> dict[str, int]:
    """Path below the folder -> bytes, of each file in it and in the folders below."""
    if isinstance(folder, ObjectPath):
        return objects.sizes(folder)
    found = {}
    for where, _, names in os.walk(folder, followlinks=True):
        for name in names:
            path = Path(where, name)
            with contextlib.suppress(FileNotFoundError):  # removed meanwhile
                found[path.relative_to(folder).as_posix()] = path.stat().st_size
    return found


def make_durable(folder: Path) -> None:
    """The names in and of a run directory, and its logs: a killed process may not have come to it.

    Raises `RunError` where that fails.
    """
    if isinstance(folder, ObjectPath):
        return
    try:
        with contextlib.suppress(PermissionError):  # a parent that may be passed, not read
            sync(folder.parent)
        for path in (folder, *folder.glob("*/"), *folder.glob("*/rank-*")):
            sync(path)
    except OSError as error:
        raise disk_error(error, folder) from error


def remove_temporaries(folder: Path, names: Iterable[str]) -> None:
    """What writers that were killed have left of files of these names, or patterns of names."""
    if isinstance(folder, ObjectPath):
        return  # what was not sent to its end is not there
    for name in names:
        inner = Path(name)
        for path in folder.glob(str(inner.with_name(f".{inner.name}{TEMPORARY}"))):
            remove(path)


def remove(path: Path) -> None:
    """A file or a folder with all that is in it; nothing when it is not there."""
    if isinstance(path, ObjectPath):
        upload.remove(path)
        return
    try:
        if path.is_dir() and not path.is_symlink():
            for inner in path.iterdir():
                remove(inner)
            disk.remove_folder(path)
        else:
            disk.remove(path)
    except FileNotFoundError:
        return
    except OSError as error:
        raise disk_error(error, path) from error


class Lock(Protocol):
    """A run directory that is held: by one process alone, or shared by those of one run."""

    def share(self) -> None:
        """Let other processes share it."""

    def alone(self) -> bool:
        """Whether no other process shares it any more."""


class FileLock:
    """A lock file that is held."""

    def __init__(self, file: IO[str]) -> None:
        self._file = file

    def share(self) -> None:
        """Let other processes share it."""
        self._take(fcntl.LOCK_SH)

    def alone(self) -> bool:
        """Whether no other process shares it any more."""
        if self._take(fcntl.LOCK_EX):
            return True
        self.share()
        return False

    def _take(self, kind: int) -> bool:
        try:
            fcntl.flock(self._file, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


@contextlib.contextmanager
def lock(path: Path, *, shared: bool = False) -> Iterator[Lock]:
    """Hold the lock file; raises `RunError` when another process holds it, or does not share it.

    The kernel drops the lock with the process, so a killed run never leaves one behind; on a
    store, where there is no lock, `lease` does what can be done.
    """
    if isinstance(path, ObjectPath):
        with lease.lease(path, shared=shared) as place:
            yield place
        return
    try:
        file = open(path, "a+")  # noqa: SIM115 - closed below, errors of opening are told apart
    except OSError as error:
        raise disk_error(error, path) from error
    with file:
        held = FileLock(file)
        try:
            taken = held._take(fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
        except OSError as error:  # no locks on this disk
            raise RunError(
                f"cannot lock {path}: {error.strerror or error}",
                "mount the disk with locks (Lustre: -o flock), or choose another --output",
            ) from error
        if not taken:
            file.seek(0)
            raise RunError(
                f"another mgen ({file.read().strip() or 'unknown process'}) is at work in "
                f"{path.parent}",
                "wait for it, stop it, or choose another --output",
            )
        if not shared:
            file.truncate(0)
            file.write(f"process {os.getpid()}")
            file.flush()
        yield held


def free_bytes(path: Path) -> int | None:
    """Free space on the disk that holds the path, or would hold it; None of a store."""
    if isinstance(path, ObjectPath):
        return None
    whole = path.absolute()
    existing = next(folder for folder in (whole, *whole.parents) if folder.exists())
    return shutil.disk_usage(existing).free


def sync(path: Path) -> None:
    """Make a file's bytes durable, or a folder's names (a rename is atomic, not durable)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        disk.sync(descriptor)
    finally:
        os.close(descriptor)


def disk_error(error: OSError, path: Path) -> RunError:
    """What the disk said, in the user's words."""
    return RunError(
        f"cannot write {path}: {error.strerror or error}",
        _HINTS.get(error.errno or 0, "mend the disk, then start the same command again"),
    )


_HINTS = {
    errno.ENOSPC: "make room, then start the same command again: it goes on where it stopped",
    errno.EDQUOT: "your quota is used up: make room, then start the same command again",
    errno.EACCES: "choose a folder that you may write to",
    errno.EPERM: "choose a folder that you may write to",
    errno.EROFS: "the disk is read-only: choose another folder",
    errno.ENOTDIR: "a file stands where a folder is needed: choose another folder",
    errno.EEXIST: "a file stands where a folder is needed: choose another folder",
}


def _write(path: Path, write: Write) -> Written:
    stream = DiskFile(path)
    with io.BufferedWriter(stream, BUFFER) as file:
        write(cast("BinaryIO", file))
    return stream.written()


def _forget(path: Path) -> None:
    with contextlib.suppress(OSError):
        disk.remove(path)


def _drop_torn_line(descriptor: int) -> None:
    end = os.fstat(descriptor).st_size
    if end == 0 or os.pread(descriptor, 1, end - 1) == b"\n":
        return
    whole = os.pread(descriptor, end, 0)
    disk.truncate(descriptor, whole.rfind(b"\n") + 1)
