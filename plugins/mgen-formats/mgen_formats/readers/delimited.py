"""csv and tsv, streamed by Arrow, every cell as the text that was written."""

from __future__ import annotations

import codecs
import contextlib
import csv
import io
import re
import secrets
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
from pyarrow import compute as pc
from pyarrow import csv as arrow_csv

from mgen_core import InputError, Reader, ReaderCard, ReaderOptions, RowError, Rows

from .source import (
    CHUNK_ROWS,
    LONGEST,
    NOT_TEXT,
    digest,
    is_text,
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

# Drawn by lot: no row of a file can look like them.
LAST = secrets.token_hex()  # in the cells of a row that is added after the last one
BROKEN = secrets.token_hex(8)  # in the place of bytes that are not UTF-8
_half_characters = re.compile("[\udc80-\udcff]+")


class DelimitedReader(Reader):
    """Opens csv or tsv files: a header line, quotes, any line end, plain or compressed."""

    def __init__(self, card: ReaderCard, options: ReaderOptions, delimiter: str) -> None:
        super().__init__(card, options)
        self.delimiter = delimiter

    def open(self, uri: str) -> Rows:
        return DelimitedRows(readable(uri), self.delimiter)


class DelimitedRows(Rows):
    """The rows of one file. Blank lines are no rows.

    A line with too many or too few cells, or with bytes that are not UTF-8, is a bad row.
    """

    def __init__(self, path: Path, delimiter: str) -> None:
        self.path = path
        self.delimiter = delimiter
        self.columns = header(path, delimiter)

    def chunks(self, columns: Sequence[str]) -> Iterator[Mapping[str, Sequence[Any]]]:
        faults = Faults(self.path, self.delimiter)
        first = 0
        for batch in batches(self.path, self.delimiter, columns, faults=faults):
            for start in range(0, batch.num_rows, CHUNK_ROWS):
                part = batch.slice(start, CHUNK_ROWS)
                cells = {name: part.column(name).to_pylist() for name in columns}
                yield faults.put(cells, first + start)
            first += batch.num_rows

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
    if any("\0" in name or not is_text(name) for name in names):  # \0: UTF-16 without its mark
        raise not_utf8(path)
    return no_twins(path, names)


class Faults:
    """Rows that cannot be read, though it is known where they begin and end."""

    def __init__(self, path: Path, delimiter: str) -> None:
        self._numbered = _numbered(path, delimiter)
        self._at = -2  # the row that was numbered last; the header is -1
        self._line = 0
        self._next = 0
        self._told: dict[int, RowError] = {}

    def add(self, row: int, what: str) -> None:
        """Rows come in order, and may come again where the file is read from its start."""
        if row >= self._next:
            self._told[row] = RowError(f"{what}: line {self._line_of(row)}")
            self._next = row + 1

    def put(self, chunk: dict[str, list[Any]], first: int) -> dict[str, list[Any]]:
        """The chunk, which begins at row `first`, with the reasons in the cells of such rows."""
        length = len(next(iter(chunk.values())))
        for row in [row for row in self._told if row < first + length]:
            reason = self._told.pop(row)
            for column in chunk.values():
                cell = column[row - first]
                if cell is None or BROKEN in cell:
                    column[row - first] = reason
        return chunk

    def _line_of(self, row: int) -> int:
        """Arrow counts rows, so the file is read beside it up to here."""
        with _long_cells(), contextlib.suppress(csv.Error):
            while self._at < row:
                self._line, _ = next(self._numbered, (self._line, []))
                self._at += 1
        return self._line


def batches(
    path: Path,
    delimiter: str,
    columns: Sequence[str],
    nulls: bool = False,
    faults: Faults | None = None,
) -> Iterator[pa.RecordBatch]:
    """The named columns as strings, in order; with `nulls`, an empty cell without quotes is null.

    Rows that cannot be read are nulls, or hold `BROKEN`, and are told to `faults`. Without it, and
    where a row cannot be told from the next, it raises `InputError` with the line number.
    """
    with reading(path):
        yield from _growing(path, delimiter, columns, nulls, faults)


def _growing(
    path: Path, delimiter: str, columns: Sequence[str], nulls: bool, faults: Faults | None
) -> Iterator[pa.RecordBatch]:
    given = 0
    for block in BLOCKS:
        start = 0
        try:
            for batch in _attempt(path, delimiter, columns, nulls, block, faults):
                if start + batch.num_rows > given:
                    yield batch.slice(max(given - start, 0))
                start += batch.num_rows
                given = max(given, start)
            return
        except pa.ArrowInvalid as error:
            if LONG_ROW not in str(error):
                raise _fault(path, delimiter, str(error), faults is None) from error
    what = f"{path}: a row after row {given} is longer than {BLOCKS[-1] >> 20} MiB"
    raise InputError(what, 'look for a quote (") that is never closed')


def _attempt(
    path: Path,
    delimiter: str,
    columns: Sequence[str],
    nulls: bool,
    block: int,
    faults: Faults | None,
) -> Iterator[pa.RecordBatch]:
    width = len(header(path, delimiter))
    convert = arrow_csv.ConvertOptions(
        include_columns=list(columns),
        column_types={name: pa.string() for name in columns},
        null_values=[""],
        strings_can_be_null=nulls,
        quoted_strings_can_be_null=False,
    )
    # When the last row does not come out, an open quote swallowed it.
    tail = f"\n{delimiter.join([LAST] * width)}\n".encode()
    skipped: dict[int, str] = {}
    first, ended = 0, False
    with opened(path) as stream, _OnDemand(stream, tail) as source:
        with source.asked():
            table = arrow_csv.open_csv(
                source,
                read_options=arrow_csv.ReadOptions(use_threads=False, block_size=block),
                parse_options=arrow_csv.ParseOptions(
                    delimiter=delimiter,
                    newlines_in_values=True,
                    invalid_row_handler=_skipping(skipped) if faults else None,
                ),
                convert_options=convert,
            )
        with table:
            while (batch := _next(table, source)) is not None:
                ended = ended or (batch.num_rows > 0 and batch.column(0)[-1].as_py() == LAST)
                batch, reasons = _with_skipped(batch, first, skipped)
                if source.broken and faults is None:
                    raise not_utf8(path)
                if source.broken:
                    reasons.update(_broken(batch, first))
                for row in sorted(reasons):
                    cast(Faults, faults).add(row, reasons[row])
                first += batch.num_rows
                yield batch.slice(0, batch.num_rows - ended)
    if not ended:
        raise pa.ArrowInvalid(OPEN_QUOTE)


def _skipping(skipped: dict[int, str]) -> Callable[[Any], str]:
    """What Arrow asks about a line of the wrong width: it is left out, and told to `skipped`."""

    def skip(line: Any) -> str:
        # Where a quote was left open it holds other rows as well.
        if "\n" in line.text or "\r" in line.text:
            return "error"
        what = f"{line.actual_columns} columns, but the header has {line.expected_columns}"
        skipped[line.number - 2] = what  # the header is number 1
        return "skip"

    return skip


def _with_skipped(
    batch: pa.RecordBatch, first: int, skipped: dict[int, str]
) -> tuple[pa.RecordBatch, dict[int, str]]:
    """The batch with nulls where rows were left out of it or right after it, and why they were."""
    end = first + batch.num_rows
    found = {}
    for row in list(skipped):  # more may come meanwhile
        if row > end:
            break
        found[row] = skipped.pop(row)
        end += 1
    if not found:
        return batch, found
    there = iter(range(batch.num_rows))
    places = [None if row in found else next(there) for row in range(first, end)]
    return batch.take(pa.array(places, pa.int64())), found


def _broken(batch: pa.RecordBatch, first: int) -> dict[int, str]:
    """The rows with bytes that are not UTF-8."""
    found = [pc.indices_nonzero(pc.match_substring(column, BROKEN)) for column in batch.columns]
    return {first + place: NOT_TEXT for places in found for place in places.to_pylist()}


def _next(table: arrow_csv.CSVStreamingReader, source: _OnDemand) -> pa.RecordBatch | None:
    with source.asked():
        try:
            return table.read_next_batch()
        except StopIteration:
            return None


class _OnDemand(io.RawIOBase):
    """A stream followed by a few more bytes, read while somebody waits for them.

    Arrow's thread would read 32 blocks ahead, however long, and go on after the table is closed.
    What is not UTF-8 comes as `BROKEN`, since Arrow would refuse the whole block.
    """

    def __init__(self, stream: io.BufferedReader, tail: bytes) -> None:
        self.broken = False
        self._stream = stream
        self._tail = tail
        self._decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self._held = b""
        self._wanted = threading.Event()
        self._ended = threading.Event()
        self._over = False

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        self._wanted.wait()
        # Always as much as is asked for: Arrow takes a row that lies in three blocks for too long.
        found, length = [self._held], len(self._held)
        while self._tail and length < size and not self._over:
            # In small pieces: a byte may become sixteen.
            block = self._stream.read(min(size - length, BLOCKS[0]))
            found.append(self._text(block, final=not block))
            if not block:
                found.append(self._tail)
                self._tail = b""
            length += len(found[-1])
        whole = b"".join(found)
        if self._over or not whole:
            self._ended.set()
            return b""
        self._held = whole[size:]
        return whole[:size]

    def _text(self, block: bytes, final: bool) -> bytes:
        if block.isascii() and not self._decoder.getstate()[0]:
            return block
        text = self._decoder.decode(block, final)
        try:
            return text.encode()
        except UnicodeEncodeError:
            self.broken = True
            return _half_characters.sub(BROKEN, text).encode()

    @contextlib.contextmanager
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


def _fault(path: Path, delimiter: str, reason: str, strict: bool) -> InputError:
    """What is wrong, with its line: Arrow counts rows, so the file is read once more."""
    try:
        with _long_cells():
            last, cells, width = _of_wrong_width(path, delimiter, strict)
    except csv.Error as error:
        return InputError(f"cannot read {path}: {error}", "check that it is a table of text")
    if len(cells) != width:
        what = f"{path}, line {last}: {len(cells)} columns, but the header has {width}"
        hint = 'quote cells that hold the separator; look for a quote (") left open'
        return InputError(what, hint)
    if reason == OPEN_QUOTE:
        hint = 'close it, or write a quote inside a cell as ""'
        return InputError(f"{path}, line {last}: {reason}", hint)
    return InputError(f"cannot read {path}: {reason}", "check that it is a table of text")


def _of_wrong_width(path: Path, delimiter: str, strict: bool) -> tuple[int, list[str], int]:
    """The first such row, its line and the right width; else the last row.

    Unless `strict`, such a row may be one line.
    """
    found: tuple[int, list[str]] = (0, [])
    width = 0
    for found in _numbered(path, delimiter):
        cells = found[1]
        width = width or len(cells)
        if len(cells) != width and (strict or any("\n" in c or "\r" in c for c in cells)):
            break
    return *found, width


@contextlib.contextmanager
def _long_cells() -> Iterator[None]:
    """While it is open, `csv` takes cells of any length; the limit is the process's, not ours."""
    limit = csv.field_size_limit(LONGEST)
    try:
        yield
    finally:
        csv.field_size_limit(limit)


def _numbered(path: Path, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Rows that are not blank, each with the number of its first line."""
    rows = csv.reader(lines(path, newline=""), delimiter=delimiter)
    line = 1
    for cells in rows:
        if cells:
            yield line, cells
        line = rows.line_num + 1
