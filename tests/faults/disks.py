"""Disks that fail in tests: doubles of `mgen_core.storage.disk`."""

from __future__ import annotations

import errno
import itertools
import os
import random
import shutil
import stat
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mgen_core.storage import Disk

CALLS = tuple(name for name in vars(Disk) if not name.startswith("_"))
ERRORS = (errno.ENOSPC, errno.EIO, errno.EINTR)


class Watched(Disk):
    """A disk whose every call is announced to `before`, which may raise instead of it."""

    def before(self, call: str) -> None:
        raise NotImplementedError


def _watched(name: str) -> Callable[..., Any]:
    real = getattr(Disk, name)

    def call(self: Watched, *words: Any) -> Any:
        if name != "close":
            self.before(name)
            return real(self, *words)
        real(self, *words)  # the kernel closes a file even where it reports an error of it
        return self.before(name)

    return call


for _name in CALLS:
    setattr(Watched, _name, _watched(_name))


class Quick(Disk):
    """A disk that does not wait: for tests in which the machine keeps its power."""

    def sync(self, descriptor: int) -> None:
        os.fstat(descriptor)


class Failing(Watched):
    """The disk fails at its k-th `call`, and where `sticky` from then on, with `error`.

    Without `error` it writes half of what it was given. `fired` tells whether it came to that.
    """

    def __init__(self, call: str, k: int, error: int | None, *, sticky: bool = False) -> None:
        self.call = call
        self.left = k
        self.error = error
        self.sticky = sticky
        self.fired = False
        self._lock = threading.Lock()  # files are synced side by side

    def before(self, call: str) -> None:
        if self.error is not None and self._now(call):
            raise OSError(self.error, os.strerror(self.error))

    def sync(self, descriptor: int) -> None:
        self.before("sync")

    def write(self, descriptor: int, data: Any) -> int:
        if self.error is None and self._now("write"):
            data = data[: max(len(data) // 2, 1)]
        return super().write(descriptor, data)

    def _now(self, call: str) -> bool:
        if call != self.call:
            return False
        with self._lock:
            self.left -= 1
            now = self.left == 0 or (self.sticky and self.left < 0)
            self.fired = self.fired or now
        return now


# --------------------------------------------------------------------------- power loss


class PowerLost(BaseException):
    """The machine is without power: nothing after this call happens."""


@dataclass(eq=False)
class File:
    """A file: what programs see of it, and what would be read after a power loss."""

    cached: bytes = b""
    durable: bytes = b""


@dataclass(eq=False)
class Folder:
    """A folder: its names as programs see them, as they are durable, and the changes between."""

    cached: dict[str, File | Folder] = field(default_factory=dict)
    durable: dict[str, File | Folder] = field(default_factory=dict)
    changes: list[Callable[[dict[str, File | Folder]], object]] = field(default_factory=list)

    def change(self, how: Callable[[dict[str, File | Folder]], object]) -> None:
        how(self.cached)
        self.changes.append(how)


class Volatile(Watched):
    """A disk below `root` with a cache, whose machine loses power before the k-th change.

    What was not synced may be lost or torn: `restore` writes below `root` what the machine finds
    when it starts again. It is meaner than file systems are: changes of a folder that was not
    synced come through in any selection, and bytes of a file that was not synced may be cut off,
    zeros or garbage.
    """

    def __init__(self, root: Path, k: int) -> None:
        self.root = root
        self.left = k
        self.lost = False
        self.tree = self._adopted(root)
        self._open: dict[int, File | Folder] = {}
        self._lock = threading.RLock()

    def before(self, call: str) -> None:
        with self._lock:
            self.left -= call != "close"
            if self.lost or self.left <= 0:
                self.lost = True
                raise PowerLost

    def open(self, path: Path, flags: int) -> int:
        with self._lock:
            descriptor = super().open(path, flags)
            folder, name = self._place(path)
            if name not in folder.cached:
                made = File()
                folder.change(lambda names: names.update({name: made}))
            file = folder.cached[name]
            assert isinstance(file, File)
            if flags & os.O_TRUNC:
                file.cached = b""
            self._open[descriptor] = file
            return descriptor

    def write(self, descriptor: int, data: Any) -> int:
        with self._lock:
            written = super().write(descriptor, data)
            file = self._open[descriptor]
            assert isinstance(file, File)
            file.cached += bytes(data[:written])  # mgen writes at the end alone
            return written

    def truncate(self, descriptor: int, length: int) -> None:
        with self._lock:
            super().truncate(descriptor, length)
            file = self._open[descriptor]
            assert isinstance(file, File)
            file.cached = file.cached[:length]

    def sync(self, descriptor: int) -> None:
        with self._lock:
            self.before("sync")  # that of the real disk would only cost time
            what = self._open.get(descriptor) or self._found(descriptor)
            if isinstance(what, Folder):
                what.durable = dict(what.cached)
                what.changes.clear()
            else:
                what.durable = what.cached

    def close(self, descriptor: int) -> None:
        with self._lock:
            self._open.pop(descriptor, None)
            super().close(descriptor)

    def rename(self, old: Path, new: Path) -> None:
        with self._lock:
            super().rename(old, new)
            (source, name), (target, _) = self._place(old), self._place(new)
            file = source.cached[name]

            def leave(names: dict[str, File | Folder]) -> None:
                if names.get(name) is file:
                    del names[name]

            def arrive(names: dict[str, File | Folder]) -> None:
                names[new.name] = file

            def move(names: dict[str, File | Folder]) -> None:
                leave(names)
                arrive(names)

            if source is target:
                source.change(move)  # both, or neither: file systems promise that much
            else:
                source.change(leave)
                target.change(arrive)

    def remove(self, path: Path) -> None:
        with self._lock:
            super().remove(path)
            self._drop(path)

    def remove_folder(self, path: Path) -> None:
        with self._lock:
            super().remove_folder(path)
            self._drop(path)

    def make_folder(self, path: Path) -> None:
        with self._lock:
            super().make_folder(path)
            folder, name = self._place(path)
            made = Folder()
            folder.change(lambda names: names.update({name: made}))

    def go_on(self, k: int) -> None:
        """It was the process that died: the cache is still there, and the next one begins."""
        self._open.clear()
        self.left, self.lost = k, False

    def restore(self, draw: random.Random) -> None:
        """Lay out below `root` what is left after the power loss."""
        shutil.rmtree(self.root)
        self._lay(self.tree, self.root, draw)

    def _lay(self, folder: Folder, path: Path, draw: random.Random) -> None:
        path.mkdir()
        names = dict(folder.durable)
        for change in folder.changes:
            if draw.random() < 0.5:
                change(names)
        for name, what in names.items():
            if isinstance(what, Folder):
                self._lay(what, path / name, draw)
            else:
                (path / name).write_bytes(torn(what, draw))

    def _adopted(self, path: Path) -> Folder:
        names: dict[str, File | Folder] = {}
        for inner in path.iterdir():
            if inner.is_dir():
                names[inner.name] = self._adopted(inner)
            else:
                names[inner.name] = File(inner.read_bytes(), inner.read_bytes())
        return Folder(names, dict(names))

    def _place(self, path: Path) -> tuple[Folder, str]:
        folder = self.tree
        for name in path.relative_to(self.root).parts[:-1]:
            inner = folder.cached[name]
            assert isinstance(inner, Folder)
            folder = inner
        return folder, path.name

    def _found(self, descriptor: int) -> File | Folder:
        """What a descriptor is open on that was not opened here."""
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        if path == self.root:
            return self.tree
        if path not in self.root.parents:
            folder, name = self._place(path)
            return folder.cached[name]
        assert stat.S_ISDIR(os.fstat(descriptor).st_mode)
        return Folder()  # above the root: not of this disk

    def _drop(self, path: Path) -> None:
        folder, name = self._place(path)
        # A lock file is opened past the disk, and nothing is lost with it.
        if name in folder.cached:
            folder.change(lambda names: names.pop(name, None))


def torn(file: File, draw: random.Random) -> bytes:
    """What a file that was not synced may hold: some of its new bytes, or others in their place."""
    if file.cached == file.durable:
        return file.durable
    same = (a == b for a, b in itertools.zip_longest(file.cached, file.durable))
    kept = sum(1 for _ in itertools.takewhile(bool, same))  # nobody wrote to these
    new = file.cached[kept:]
    some = new[: draw.randint(0, len(new))]
    rest = len(new) - len(some)
    block = bytes(draw.randrange(256) for _ in range(min(rest, 512)))
    found = [some, some + bytes(rest), some + block, new]
    return draw.choice([file.durable, *(file.cached[:kept] + tail for tail in found)])
