"""One file as a source of rows: checked, decompressed, cut into chunks, fingerprinted."""

from __future__ import annotations

import hashlib
import io
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa

from mgen_core import InputError, place

CHUNK_ROWS = 4096
CHUNK_BYTES = 32 << 20  # rows may be chromosomes: a chunk is bounded in bytes as well
LONGEST = 256 << 20  # of a row: a human chromosome fits, a few kB that unpack to 10 GB do not

COMPRESSION = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd"}
NOT_TEXT = "not UTF-8 text"
BOM = b"\xef\xbb\xbf"


def readable(uri: str) -> Path:
    """The path of a file that can be read. Raises `InputError` for anything else."""
    path = place(uri)
    try:
        with path.open("rb"):
            return path
    except IsADirectoryError as error:
        hint = f"name the files in it, for example '{path / '*'}'"
        raise InputError(f"{uri} is a folder", hint) from error
    except OSError as error:
        hint = "check the path and who may read it"
        raise InputError(f"cannot read {uri}: {error.strerror}", hint) from error


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn what reading may raise into `InputError` with the file's name."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise not_utf8(path) from error
    except (pa.ArrowException, OSError) as error:
        hint = "it may be cut short or damaged: fetch it again"
        raise InputError(f"cannot read {path}: {error}", hint) from error


def not_utf8(path: Path) -> InputError:
    """The error for text in another encoding."""
    hint = f"convert it, for example: iconv -f latin1 -t utf-8 {path.name} > new-{path.name}"
    return InputError(f"{path} is {NOT_TEXT}", hint)


def handle(path: Path) -> str | io.BufferedReader:
    """What Arrow reads: a file of this machine it opens by itself."""
    return str(path) if isinstance(path, Path) else path.open("rb")


def opened(path: Path) -> io.BufferedReader:
    """The file's bytes, decompressed as its suffix says, without a byte order mark."""
    packed = COMPRESSION.get(path.suffix.lower())
    stream = io.BufferedReader(pa.input_stream(handle(path), compression=packed), 1 << 20)
    if stream.peek(len(BOM)).startswith(BOM):
        stream.read(len(BOM))
    return stream


def lines(path: Path, newline: str | None = None) -> Iterator[str]:
    """The lines of a text, each with its end; `newline` as `open` takes it.

    Bytes that are not UTF-8 come as half characters, so that they cost their own row alone:
    `is_text`. Raises `InputError` for a line beyond `LONGEST`, before more of it is read.
    """
    with (
        reading(path),
        io.TextIOWrapper(opened(path), "utf-8", "surrogateescape", newline) as text,
    ):
        number = 0
        while line := text.readline(LONGEST):
            number += 1
            if len(line) == LONGEST:
                raise too_long(f"{path}, line {number}")
            yield line


def is_text(line: str) -> bool:
    """Whether all of what `lines` gave was UTF-8."""
    try:
        return line.isascii() or bool(line.encode())
    except UnicodeEncodeError:
        return False


def too_long(where: str) -> InputError:
    """The error for a row that is not worth its memory."""
    what = f"{where}: longer than {LONGEST >> 20} MiB"
    return InputError(what, "no model takes so much in one piece: check the file, or cut it")


def chunked(
    columns: Sequence[str], records: Iterable[tuple[int, Sequence[Any]]]
) -> Iterator[Mapping[str, Sequence[Any]]]:
    """Records, each with its size in bytes, as chunks of columns."""
    rows: list[Sequence[Any]] = []
    held = 0
    for size, record in records:
        rows.append(record)
        held += size
        if len(rows) == CHUNK_ROWS or held >= CHUNK_BYTES:
            yield dict(zip(columns, zip(*rows)))
            rows, held = [], 0
    if rows:
        yield dict(zip(columns, zip(*rows)))


def chunk_rows(length: int, size: int) -> int:
    """How many rows make a chunk of a table of `length` rows and `size` bytes."""
    return max(1, min(CHUNK_ROWS, CHUNK_BYTES * max(length, 1) // max(size, 1)))


def no_twins(path: Path, columns: Sequence[str]) -> list[str]:
    """The columns' names. Raises `InputError` when one occurs twice."""
    for name, times in Counter(columns).items():
        if times > 1:
            what = f"{path} has two columns named {name[:40]!r}"
            raise InputError(what, "rename one of them")
    return list(columns)


def digest(path: Path) -> str:
    """SHA-256 of a file's bytes; of a folder, of the names and bytes of all its files."""
    whole = hashlib.sha256()
    if path.is_file():
        _feed(whole, path)
        return whole.hexdigest()
    for file in sorted(file for file in path.rglob("*") if file.is_file()):
        one = hashlib.sha256()
        _feed(one, file)
        whole.update(f"{file.relative_to(path).as_posix()}\0{one.hexdigest()}\n".encode())
    return whole.hexdigest()


def _feed(whole: hashlib._Hash, path: Path) -> None:
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            whole.update(block)
