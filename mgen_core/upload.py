"""New files on an object store.

A store has no rename and no append. A file is put whole: it is there when the store has all of
it, or not at all. What is added to a log is a file of its own.
"""

from __future__ import annotations

import contextlib
import io
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, BinaryIO, cast

from .asking import AGAIN, ask
from .errors import RunError
from .objects import AT_ONCE, BUFFER, ObjectPath, sizes
from .stream import Stream, Written

SMALL = 64 << 20  # is sent in one request, and again where that fails; the rest in pieces of it


class Upload(Stream):
    """A new object. Until `finish` it is not there, nor is it when that fails."""

    def __init__(self, path: ObjectPath) -> None:
        super().__init__()
        self._path = path
        self._held = bytearray()
        self._file: Any = None
        self._over = False

    def take(self, view: memoryview) -> int:
        if self._over:
            return len(view)
        if self._file is None and len(self._held) + len(view) > SMALL:
            self._file = ask("write", self._path, self._opened)
            self._send(bytes(self._held))
            self._held.clear()
        if self._file is None:
            self._held += view
        else:
            self._send(bytes(view))
        return len(view)

    def finish(self) -> Written:
        """Give it its name, and see that all of it is there."""
        if self._file is None:
            ask("write", self._path, lambda store, key: store.pipe_file(key, bytes(self._held)))
        else:
            ask("write", self._path, lambda *_: self._file.close(), again=False)
        self._over = True
        self._held.clear()
        size = int(ask("write", self._path, lambda store, key: store.info(key)["size"]))
        if size != self._bytes:
            raise RunError(f"{self._path} has {size:,} of {self._bytes:,} bytes", AGAIN)
        return self.written()

    def discard(self) -> None:
        """Leave nothing of it."""
        file, self._file = self._file, None
        self._over = True
        self._held.clear()
        if file is not None:
            # A file of fsspec that is closed, even by the end of its life, is completed.
            with contextlib.suppress(Exception):
                file.discard()
            with contextlib.suppress(Exception):
                file.closed = True

    def _opened(self, store: Any, key: str) -> Any:
        return store.open(key, "wb", block_size=SMALL)

    def _send(self, data: bytes) -> None:
        # The file system has tried again by itself; what it holds by now, nobody knows.
        ask("write", self._path, lambda *_: self._file.write(data), again=False)


def put_all(files: Mapping[ObjectPath, Callable[[BinaryIO], object]]) -> dict[ObjectPath, Written]:
    """New objects: on return all are there, whole. What was there under their names is replaced."""
    uploads = {path: Upload(path) for path in files}
    try:
        for path, write in files.items():
            with io.BufferedWriter(uploads[path], BUFFER) as file:
                write(cast("BinaryIO", file))
        with ThreadPoolExecutor(AT_ONCE) as pool:
            return dict(zip(files, pool.map(Upload.finish, uploads.values())))
    except BaseException:
        for upload in uploads.values():
            upload.discard()
        raise


def put_lines(log: ObjectPath, lines: Sequence[str]) -> None:
    """Lines of a log, as an object of their own beside it: `log-<drawn by lot>.jsonl`.

    The name is one that no other process writes, nor this one twice.
    """
    path = log.with_name(f"{log.stem}-{secrets.token_hex(6)}{log.suffix}")
    text = "".join(f"{line}\n" for line in lines).encode()
    put_all({path: lambda file: file.write(text)})


def remove(path: ObjectPath) -> None:
    """A file, or all in a folder; nothing when it is not there."""
    below: Iterable[str] = sizes(path)
    files = [path / name for name in below] or [path]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        list(pool.map(remove_file, files))


def remove_file(path: ObjectPath) -> None:
    """A file, which may be gone already."""

    def gone(store: Any, key: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            store.rm_file(key)

    ask("write", path, gone)
