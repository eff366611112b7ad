"""Every call that changes the disk: atomic files, append-only logs, the lock.

A file appears under its name only when it is complete and durable: it is written beside it,
fsynced, renamed, and the folder is fsynced. Nothing else in mgen writes, renames or deletes.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO

from .errors import RunError

TEMPORARY = ".tmp"
SYNCERS = 16


def make_folder(path: Path) -> list[Path]:
    """The folder and its parents, durable; gives those that were not there, innermost first.

    Raises `RunError` where it cannot be.
    """
    try:
        new = [folder for folder in (path, *path.parents) if not folder.exists()]
        path.mkdir(parents=True, exist_ok=True)
        for folder in new:
            sync(folder.parent)
    except OSError as error:
        raise disk_error(error, path) from error
    return new


def write_atomic(path: Path, write: Callable[[Path], None]) -> None:
    """Call `write` on a temporary path, then give the result its name, durably."""
    write_all({path: write})


def write_all(files: Mapping[Path, Callable[[Path], None]]) -> None:
    """`write_atomic` of several files: on return all are durable under their names.

    Files are synced side by side, which a disk does in little more time than it takes for one.
    """
    temporaries = {path: path.with_name(f".{path.name}{TEMPORARY}") for path in files}
    path = next(iter(files))
    try:
        for path, write in files.items():
            write(temporaries[path])
        with ThreadPoolExecutor(SYNCERS) as pool:
            list(pool.map(sync, temporaries.values()))
        for path, temporary in temporaries.items():
            os.replace(temporary, path)
        for folder in {path.parent for path in files}:
            sync(folder)
    except BaseException as error:
        for temporary in temporaries.values():
            _forget(temporary)
        if isinstance(error, OSError):
            raise disk_error(error, path) from error
        raise


def write_text(path: Path, text: str) -> None:
    """A whole text file, atomically."""
    write_atomic(path, lambda temporary: _write(temporary, text))


def append_lines(path: Path, lines: Sequence[str]) -> None:
    """Durable lines at the end of a log; a line that was torn by a crash is cut off first."""
    try:
        new = not path.exists()
        with open(path, "a+b") as file:
            _drop_torn_line(file)
            file.write("".join(f"{line}\n" for line in lines).encode())
            file.flush()
            os.fsync(file.fileno())
        if new:
            sync(path.parent)
    except OSError as error:
        raise disk_error(error, path) from error


def remove_temporaries(folder: Path) -> None:
    """What writers that were killed have left in the folders of the ranks."""
    for path in folder.glob(f"*/rank-*/.*{TEMPORARY}"):
        remove(path)


def remove(path: Path) -> None:
    """A file or a folder with all that is in it; nothing when it is not there."""
    try:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        raise disk_error(error, path) from error


class Lock:
    """A lock file that is held: by one process alone, or shared by those of one run."""

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

    The kernel drops the lock with the process, so a killed run never leaves one behind.
    """
    try:
        file = open(path, "a+")  # noqa: SIM115 - closed below, errors of opening are told apart
    except OSError as error:
        raise disk_error(error, path) from error
    with file:
        held = Lock(file)
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


def checksum(path: Path) -> str:
    """SHA-256 of a file's bytes, as `sha256sum` prints it."""
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def free_bytes(path: Path) -> int:
    """Free space on the disk that holds the path, or would hold it."""
    whole = path.absolute()
    existing = next(folder for folder in (whole, *whole.parents) if folder.exists())
    return shutil.disk_usage(existing).free


def sync(path: Path) -> None:
    """Make a file's bytes durable, or a folder's names (a rename is atomic, not durable)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
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


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _forget(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)


def _drop_torn_line(file: IO[bytes]) -> None:
    end = file.seek(0, os.SEEK_END)
    if end == 0:
        return
    file.seek(end - 1)
    if file.read(1) != b"\n":
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)
