"""csv and tsv, streamed by Arrow, every cell as the text that was written."""

from __future__ import annotations

import csv
import io
import secrets
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import csv as arrow_csv

from mgen_core import InputError, Reader, ReaderCard, ReaderOptions, Rows

from .source import (
    CHUNK_ROWS,
    LONGEST,
    digest,
    lines,
    no_twins,
    not_utf8,
    opened,
    readable,
    reading,
)

# A row must fit into a block. Small blocks are fast (cache); longer rows start over with the next.
BLOCKS = (1 << 20, 4 << 20, 16 << 20, 64 << 20, LONGEST)
LONG_ROW = "straddl"  # Arrow's word for a row longer than the block

OPEN_QUOTE = "a quote is opened and never closed"


class DelimitedReader(Reader):
    """Opens csv or tsv files: a header line, quotes, any line end, plain or compressed."""

    def __init__(self, card: ReaderCard, options: ReaderOptions, delimiter: str) -> None:
        super().__init__(card, options)
        self.delimiter = delimiter

    def open(self, uri: str) -> Rows:
        return DelimitedRows(readable(uri), self.delimiter)


class DelimitedRows(Rows):
    """The rows of one file. Blank lines are no rows."""

    def __init__(self, path: Path, delimiter: str) -> None:
        self.path = path
        self.delimiter = delimiter
        self.columns = header(path, delimiter)

    def chunks(self, columns: Sequence[str]) -> Iterator[Mapping[str, Sequence[Any]]]:
        for batch in batches(self.path, self.delimiter, columns):
            for start in range(0, batch.num_rows, CHUNK_ROWS):
                part = batch.slice(start, CHUNK_ROWS)
                yield {name: part.column(name).to_pylist() for name in columns}

    def digest(self) -> str:
        return digest(self.path)


def header(path: Path, delimiter: str) -> list[str]:
    """The names on the first line that is not blank."""
    try:
        _, names = next(_numbered(path, delimiter), (0, None))
    except csv.Error as error:
        hint = "its first line must name the columns"
        raise InputError(f"cannot read the header of {path}: {error}", hint) from error
    if names is None:
        raise InputError(f"{path} is empty", "its first line must name the columns")
    if any("\0" in name for name in names):  # as of UTF-16 without its mark
        raise not_utf8(path)
    return no_twins(path, names)


def batches(
    path: Path, delimiter: str, columns: Sequence[str], nulls: bool = False
) -> Iterator[pa.RecordBatch]:
    """The named columns as strings, in order; with `nulls`, an empty cell without quotes is null.

    Raises `InputError` with the line number for a row of the wrong width or an open quote.
    """
    with reading(path):
        yield from _growing(path, delimiter, columns, nulls)


def _growing(
    path: Path, delimiter: str, columns: Sequence[str], nulls: bool
) -> Iterator[pa.RecordBatch]:
    given = 0
    for block in BLOCKS:
        start = 0
        try:
            for batch in _attempt(path, delimiter, columns, nulls, block):
                if start + batch.num_rows > given:
                    yield batch.slice(max(given - start, 0))
                start += batch.num_rows
                given = max(given, start)
            return
        except pa.ArrowInvalid as error:
            if LONG_ROW not in str(error):
                raise _fault(path, delimiter, str(error)) from error
    what = f"{path}: a row after row {given} is longer than {BLOCKS[-1] >> 20} MiB"
    raise InputError(what, 'look for a quote (") that is never closed')


def _attempt(
    path: Path, delimiter: str, columns: Sequence[str], nulls: bool, block: int
) -> Iterator[pa.RecordBatch]:
    width = len(header(path, delimiter))
    # A row added after the last one. When it does not come out, an open quote swallowed it.
    # Its cells are drawn by lot: no row of the file can look like it.
    last = secrets.token_hex()
    convert = arrow_csv.ConvertOptions(
        include_columns=list(columns),
        column_types={name: pa.string() for name in columns},
        null_values=[""],
        strings_can_be_null=nulls,
        quoted_strings_can_be_null=False,
    )
    tail = f"\n{delimiter.join([last] * width)}\n".encode()
    ended = False
    with opened(path) as stream, _OnDemand(stream, tail) as source:
        with source.asked():
            table = arrow_csv.open_csv(
                source,
                read_options=arrow_csv.ReadOptions(use_threads=False, block_size=block),
                parse_options=arrow_csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
                convert_options=convert,
            )
        with table:
            while (batch := _next(table, source)) is not None:
                ended = ended or (batch.num_rows > 0 and batch.column(0)[-1].as_py() == last)
                yield batch.slice(0, batch.num_rows - ended)
    if not ended:
        raise pa.ArrowInvalid(OPEN_QUOTE)


def _next(table: arrow_csv.CSVStreamingReader, source: _OnDemand) -> pa.RecordBatch | None:
    with source.asked():
        try:
            return table.read_next_batch()
        except StopIteration:
            return None


class _OnDemand(io.RawIOBase):
    """A stream followed by a few more bytes, read while somebody waits for them.

    Arrow's thread would read 32 blocks ahead, however long, and go on after the table is closed.
    """

    def __init__(self, stream: io.BufferedReader, tail: bytes) -> None:
        self._stream = stream
        self._tail = tail
        self._wanted = threading.Event()
        self._ended = threading.Event()
        self._over = False

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        self._wanted.wait()
        block = b"" if self._over else self._stream.read(size)
        left = size - len(block)
        block, self._tail = block + self._tail[:left], self._tail[left:]
        if self._over or not block:
            self._ended.set()
            return b""
        return block

    @contextmanager
    def asked(self) -> Iterator[None]:
        """While it is open the thread may read; a block that it has begun it may finish."""
        self._wanted.set()
        try:
            yield
        finally:
            self._wanted.clear()

    def close(self) -> None:
        if not self._over:
            self._over = True
            self._wanted.set()
            # An interpreter that ends while the thread copies a block would abort. A thread that
            # rests, since it is far ahead, never comes back.
            self._ended.wait(timeout=10)
            super().close()


def _fault(path: Path, delimiter: str, reason: str) -> InputError:
    """What is wrong, with its line: Arrow counts rows, so the file is read once more."""
    if "UTF8" in reason:
        return not_utf8(path)
    limit = csv.field_size_limit(LONGEST)
    width = last = 0
    try:
        for last, cells in _numbered(path, delimiter):
            width = width or len(cells)
            if len(cells) != width:
                what = f"{path}, line {last}: {len(cells)} columns, but the header has {width}"
                hint = 'quote cells that hold the separator; look for a quote (") left open'
                return InputError(what, hint)
    except csv.Error as error:
        reason = str(error)
    finally:
        csv.field_size_limit(limit)  # the process's, not ours
    if reason == OPEN_QUOTE:
        hint = 'close it, or write a quote inside a cell as ""'
        return InputError(f"{path}, line {last}: {reason}", hint)
    return InputError(f"cannot read {path}: {reason}", "check that it is a table of text")


def _numbered(path: Path, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Rows that are not blank, each with the number of its first line."""
    rows = csv.reader(lines(path, newline=""), delimiter=delimiter)
    line = 1
    for cells in rows:
        if cells:
            yield line, cells
        line = rows.line_num + 1
