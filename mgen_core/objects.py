"""Files on an object store, named by a URL that fsspec knows: `s3://bucket/folder/file`.

fsspec is imported when the first URL is met, not before.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import time
from collections.abc import Iterator, Mapping
from fnmatch import fnmatch
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import IO, Any, NamedTuple, cast

from .asking import ask, check_scheme, no_such

AT_ONCE = 16  # requests
BLOCK = 8 << 20  # is read ahead
BUFFER = 1 << 20
LOOK_S = 5.0
"""At most so often a store is asked what is new in its logs."""


class Facts(NamedTuple):
    """What a store knows of a file. `modified`: seconds by the store's own clock, if it tells."""

    st_size: int
    modified: float | None


class ObjectPath:
    """A path on an object store: the part of `pathlib.Path` that mgen uses.

    Unlike with fsspec's own `exists`, a store that does not answer is an error, not a no: a run
    that was not found would be begun anew.
    """

    def __init__(self, url: str) -> None:
        self.scheme, _, key = url.partition("://")
        self.key = PurePosixPath(key)

    def __str__(self) -> str:
        return f"{self.scheme}://{self.key}"

    def __repr__(self) -> str:
        return f"ObjectPath({str(self)!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ObjectPath) and str(self) == str(other)

    def __hash__(self) -> int:
        return hash(str(self))

    def __lt__(self, other: ObjectPath) -> bool:
        return str(self) < str(other)

    def __truediv__(self, name: str | PurePosixPath) -> ObjectPath:
        return ObjectPath(f"{self}/{name}")

    @property
    def name(self) -> str:
        return self.key.name

    @property
    def stem(self) -> str:
        return self.key.stem

    @property
    def suffix(self) -> str:
        return self.key.suffix

    @property
    def parent(self) -> ObjectPath:
        return ObjectPath(f"{self.scheme}://{self.key.parent}")

    def with_name(self, name: str) -> ObjectPath:
        return self.parent / name

    def relative_to(self, other: ObjectPath) -> PurePosixPath:
        return self.key.relative_to(other.key)

    def resolve(self) -> ObjectPath:
        return self

    absolute = resolve

    def exists(self) -> bool:
        return self._info() is not None

    def is_file(self) -> bool:
        return (self._info() or {}).get("type") == "file"

    def is_dir(self) -> bool:
        return (self._info() or {}).get("type") == "directory"

    def stat(self) -> Facts:
        info = self._info()
        if info is None:
            raise no_such(self)
        return _facts(info)

    def iterdir(self) -> Iterator[ObjectPath]:
        return (self / name for name in sorted(listed(self)))

    def glob(self, pattern: str) -> Iterator[ObjectPath]:
        """Those right in this folder."""
        return (path for path in self.iterdir() if fnmatch(path.name, pattern))

    def rglob(self, pattern: str) -> Iterator[ObjectPath]:
        """The files in this folder and those below it."""
        found = (self / name for name in sorted(sizes(self)))
        return (path for path in found if fnmatch(path.name, pattern))

    def read_bytes(self) -> bytes:
        return bytes(ask("read", self, lambda store, key: store.cat_file(key)))

    def read_text(self, encoding: str = "utf-8", errors: str = "strict") -> str:
        return self.read_bytes().decode(encoding, errors)

    def open(
        self,
        mode: str = "r",
        buffering: int = BUFFER,
        encoding: str | None = None,
        errors: str | None = None,
        newline: str | None = None,
    ) -> IO[Any]:
        """Its bytes or text, read ahead as they are asked for."""
        if mode not in ("r", "rt", "rb"):
            raise ValueError(f"mode {mode!r}: files on a store are written through `storage`")
        content = io.BufferedReader(_Reading(self), buffering)
        return content if mode == "rb" else io.TextIOWrapper(content, encoding, errors, newline)

    def _info(self) -> dict[str, Any] | None:
        with contextlib.suppress(FileNotFoundError):
            return cast("dict[str, Any]", ask("read", self, lambda store, key: store.info(key)))
        return None


def place(text: str) -> Path:
    """What the user typed as a path: of this machine, or a URL's.

    The latter is an `ObjectPath`, which looks like a `Path` to all but `storage`. Raises
    `MgenError` for a URL of a kind that nothing here can open.
    """
    scheme, colon, rest = str(text).partition("://")
    if not colon:
        return Path(text)
    if scheme in ("file", "local"):
        return Path(rest)
    check_scheme(scheme, str(text))
    return cast("Path", ObjectPath(str(text)))


def is_url(text: str) -> bool:
    """Whether it is a URL, and no path of this machine."""
    return "://" in text


def matches(url: str) -> list[str]:
    """The files that a URL with `*` or `[...]` stands for, sorted; itself where it has none."""
    path = place(url)
    if not isinstance(path, ObjectPath) or not any(sign in url for sign in "*["):
        return [url]
    if path.exists():
        return [url]

    def found(store: Any, key: str) -> list[str]:
        return sorted(store.unstrip_protocol(name) for name in store.glob(key))

    return ask("read", path, found)


# --------------------------------------------------------------------------- what is there


def listed(folder: ObjectPath) -> dict[str, dict[str, Any]]:
    """Name -> what the store knows of each file and folder right in the folder; none if it is not.

    One request for a thousand.
    """

    def inside(store: Any, key: str) -> list[dict[str, Any]]:
        # Some stores mark an empty folder by a file of its very name.
        itself = key.rstrip("/")
        found = store.ls(key, detail=True)
        return [info for info in found if info["name"].rstrip("/") != itself]

    try:
        found = ask("read", folder, inside)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    return {PurePosixPath(info["name"]).name: info for info in found}


def sizes(folder: ObjectPath) -> dict[str, int]:
    """Path below the folder -> bytes of each file in it and in the folders below."""
    found = {}
    for name, info in listed(folder).items():
        if info["type"] == "directory":
            inner = sizes(folder / name)
            found.update({f"{name}/{below}": size for below, size in inner.items()})
        else:
            found[name] = int(info["size"])
    return found


def facts(folder: ObjectPath) -> dict[str, Facts]:
    """Name -> what is known of each file right in the folder."""
    return {n: _facts(info) for n, info in listed(folder).items() if info["type"] == "file"}


def _facts(info: Mapping[str, Any]) -> Facts:
    from datetime import datetime

    names = ("LastModified", "mtime", "last_modified", "updated", "created")
    when = next((info[name] for name in names if info.get(name)), None)
    if isinstance(when, str):
        when = datetime.fromisoformat(when.replace("Z", "+00:00"))
    if isinstance(when, datetime):
        when = when.timestamp()
    return Facts(int(info.get("size") or 0), when)


def new_files(folder: ObjectPath, pattern: str) -> Iterator[list[bytes]]:
    """At each step the files that came to the folder since the one before, oldest first."""
    from concurrent.futures import ThreadPoolExecutor

    seen: set[str] = set()
    looked = float("-inf")
    while True:
        if time.monotonic() - looked < LOOK_S:
            yield []
            continue
        there = facts(folder)
        fresh = [name for name in there if name not in seen and fnmatch(name, pattern)]
        fresh.sort(key=lambda name: (there[name].modified or 0.0, name))
        with ThreadPoolExecutor(AT_ONCE) as pool:
            paths, known = [folder / name for name in fresh], [there[name] for name in fresh]
            found = list(pool.map(_once, paths, known))
        seen.update(fresh)
        looked = time.monotonic()
        yield found


@lru_cache(4096)
def _once(path: ObjectPath, facts: Facts) -> bytes:
    """A file that does not change: whoever asks for it again gets what came the first time."""
    return path.read_bytes()


class _Reading(io.RawIOBase):
    """An object that is read. Bytes that do not come are asked for again, or told."""

    def __init__(self, path: ObjectPath) -> None:
        self._path = path
        self._file = ask("read", path, self._opened)

    def _opened(self, store: Any, key: str) -> Any:
        file = store.open(key, "rb", block_size=BLOCK, cache_type="readahead")
        if getattr(file, "details", {}).get("type") == "directory":
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(self._path))
        return file

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return bool(self._file.seekable())

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return int(self._file.seek(offset, whence))

    def tell(self) -> int:
        return int(self._file.tell())

    def readinto(self, buffer: Any) -> int:
        # A file of unknown size is a stream, which has no second try.
        again = self._file.size is not None
        found = ask("read", self._path, lambda *_: self._read(len(buffer)), again=again)
        buffer[: len(found)] = found
        return len(found)

    def _read(self, most: int) -> bytes:
        before = self._file.tell()
        found = bytes(self._file.read(most))
        size = self._file.size
        if size is not None and len(found) < min(most, size - before):
            self._file.seek(before)
            raise OSError(f"{len(found):,} bytes came at {before:,} of {size:,}")
        return found

    def close(self) -> None:
        if not self.closed:
            super().close()
            self._file.close()
