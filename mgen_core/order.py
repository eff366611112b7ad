"""The rows of a run in input order, a window of the plan at a time, in bounded memory.

Parts are read ahead in threads, checked and decoded as they come. A window's rows are then put in
order slice by slice, so that no second copy of a window is ever made.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from .api import Writer
from .aside import Failures, set_aside
from .columns import ERROR, ROW, null_rows
from .errors import RunError
from .gather import gather, value_bytes
from .manifest import Done, Manifest
from .parts import open_part, read_part
from .plan import Failure
from .selection import Indices, RowFilter, Selection, integers, take

MEMORY = 7 << 25  # of the parts that are held, decoded or on their way
CHUNK_BYTES = 1 << 22  # smaller pieces of a window are joined to chunks of it
SLICE_BYTES = 1 << 23  # rows are put in order so many bytes at a time
READERS = 2
MOST_AHEAD = 64

Told = Callable[[int], None]
"""Hears how many rows of the input have passed."""


class Piece(NamedTuple):
    """A part as it was read: the numbers of all its rows, and those rows that are wanted."""

    rows: Indices
    table: pa.Table


@dataclass(frozen=True)
class Source:
    """How the parts of a run are read.

    `stored` is their schema, `schema` that of the result; `sample` are a few rows as stored;
    `swell` is what a part takes decoded, beside its bytes, in multiples of these.
    """

    manifest: Manifest
    writer: Writer
    stored: pa.Schema
    schema: pa.Schema
    selection: Selection
    sample: pa.Table
    swell: float

    @property
    def names(self) -> list[str]:
        """Columns that are decoded."""
        return [name for name in self.stored.names if name in {ROW, *self.schema.names}]


def ordered(
    source: Source, done: Sequence[Done], told: Told = lambda rows: None
) -> Generator[pa.Table, None, None]:
    """The wanted rows in input order; every row of a whole window is proved to be there once."""
    selection, manifest = source.selection, source.manifest
    keep = RowFilter(selection.where, source.stored) if selection.where else None
    later = Failures(set_aside(manifest, done))
    with contextlib.closing(Loader(source, keep, (part for part in done if part.rows))) as loader:
        for first, rows, batches, parts in manifest.by_window(done):
            pieces = deque(loader.take() for part in parts if part.rows)
            failures = later.before(first + rows)
            found = [piece.rows for piece in pieces]
            found.append(np.array([failure.row for failure in failures], np.int64))
            whole = sum(len(part.batches) for part in parts) == batches
            check_rows(np.concatenate(found), first, rows, whole=whole)
            kept = wanted(failures, keep, selection)
            window = Window(chunks(emptied(pieces)), kept, source.schema)
            for end, table in window.slices():
                yield table
                loader.fill()
                told(first + round(rows * end))
            del window
            pa.default_memory_pool().release_unused()
            loader.release()
            told(first + rows)


class Loader:
    """Reads parts in their order, ahead of their use while the memory lasts."""

    def __init__(self, source: Source, keep: RowFilter | None, parts: Iterable[Done]) -> None:
        self._source, self._keep = source, keep
        self._parts = deque(parts)
        self._pool = ThreadPoolExecutor(READERS, "mgen-parts")
        self._coming: deque[tuple[Future[Piece], float]] = deque()
        self._held = 0.0

    def take(self) -> Piece:
        """The next part. It counts as held until `release`."""
        if not self._coming:
            self._submit()
        future, _ = self._coming[0]
        piece = future.result()
        self._coming.popleft()
        self._held += piece.table.nbytes
        self.fill()
        return piece

    def fill(self) -> None:
        """Read as far ahead as there is room."""
        while self._parts and len(self._coming) < MOST_AHEAD:
            coming = sum(cost for _, cost in self._coming)
            if self._held + coming + self._cost(self._parts[0]) > MEMORY:
                return
            self._submit()

    def release(self) -> None:
        """What was taken is not held any more."""
        self._held = 0.0
        self.fill()

    def close(self) -> None:
        """Stop reading."""
        self._pool.shutdown(cancel_futures=True)

    def _submit(self) -> None:
        part = self._parts.popleft()
        future = self._pool.submit(load, self._source, self._keep, part)
        self._coming.append((future, self._cost(part)))

    def _cost(self, part: Done) -> float:
        return part.bytes * (1 + self._source.swell)


def load(source: Source, keep: RowFilter | None, part: Done) -> Piece:
    """A part, read once. Wide columns are decoded only where rows of it are wanted."""
    content = open_part(source.manifest, part)

    def read(names: Sequence[str]) -> pa.Table:
        return read_part(source.manifest, source.writer, part, content, names)

    if keep is None:
        table = read(source.names)
        return Piece(integers(table), plain(table, source))
    narrow = read(keep.names)
    places = keep(narrow)
    if not len(places):
        return Piece(integers(narrow), plain(None, source))
    table = plain(read(source.names), source)
    return Piece(integers(narrow), table if len(places) == len(table) else take(table, places))


def plain(table: pa.Table | None, source: Source) -> pa.Table:
    """The columns that are kept in memory, in the types of the run."""
    schema = pa.schema([source.stored.field(name) for name in source.names])
    if table is None:
        return pa.Table.from_batches([], schema)
    return table.select(source.names).cast(schema)


def wanted(
    failures: Sequence[Failure], keep: RowFilter | None, selection: Selection
) -> Sequence[Failure]:
    """The rows set aside that are part of the result."""
    if selection.drop_failed or not failures:
        return ()
    if keep is None:
        return failures
    return [failures[place] for place in keep(null_rows(keep.schema, failures)).tolist()]


def check_rows(found: Indices, first: int, rows: int, *, whole: bool) -> None:
    """Every row of the window exactly once; a window with missing batches: none twice."""
    inside = found[(found >= first) & (found < first + rows)] - first
    counts = np.bincount(inside, minlength=rows)
    strange = len(found) - len(inside)
    if strange or (counts > 1).any() or (whole and (counts < 1).any()):
        twice, missing = np.flatnonzero(counts > 1) + first, np.flatnonzero(counts < 1) + first
        raise RunError(
            f"rows are wrong in the parts: twice {listed(twice.tolist()) or 'none'}; "
            f"missing {listed(missing.tolist() if whole else []) or 'none'}; "
            f"from elsewhere {strange or 'none'}",
            "the run directory was changed by hand: start anew with --overwrite",
        )


def listed(numbers: Sequence[object], most: int = 8) -> str:
    """A few numbers, or names, and how many more."""
    more = f" and {len(numbers) - most:,} more" if len(numbers) > most else ""
    return ", ".join(map(str, numbers[:most])) + more


def emptied(pieces: deque[Piece]) -> Iterator[pa.Table]:
    """Their tables, which nobody else holds any more."""
    while pieces:
        yield pieces.popleft().table


def chunks(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """The same rows in tables of one chunk; thousands of parts do not make thousands of them."""
    held: list[pa.Table] = []
    size = 0
    for table in tables:
        for batch in table.to_batches():
            one, more = pa.Table.from_batches([batch]), batch.nbytes
            if more >= CHUNK_BYTES:
                yield one
                continue
            if len(one):
                held.append(one)
                size += more
            if size >= CHUNK_BYTES:
                yield pa.concat_tables(held).combine_chunks()
                held, size = [], 0
    if held:
        yield pa.concat_tables(held).combine_chunks()


class Window:
    """The wanted rows of a window, in the order of its parts: computed ones, then failures.

    No column is ever one array, so that lists may hold more in all than a 32-bit offset reaches.
    """

    def __init__(
        self, tables: Iterable[pa.Table], failures: Sequence[Failure], schema: pa.Schema
    ) -> None:
        found = list(tables)
        self._tables = [_whole(table, schema) for table in found]
        self._gather = gather(self._tables)
        self._failures = failures
        self._schema = schema
        lengths = [len(table) for table in self._tables] + [len(failures)]
        rows = [integers(table) for table in found]
        rows.append(np.array([failure.row for failure in failures], np.int64))
        self._order = np.argsort(np.concatenate(rows), kind="stable")
        self._table_of = np.repeat(np.arange(len(lengths)), lengths)
        self._place_of = np.concatenate([np.arange(length) for length in lengths])

    def slices(self) -> Iterator[tuple[float, pa.Table]]:
        """The rows in order, some at a time, and which share of the window has passed."""
        total = len(self._order)
        step = self._step()
        for start in range(0, total, step):
            table = self._rows(self._order[start : start + step])
            yield min(start + step, total) / total, table

    def _step(self) -> int:
        """Rows of a slice. A null vector takes the room of one."""
        computed = len(self._order) - len(self._failures)
        held = sum(table.nbytes for table in self._tables)
        row = held / computed if computed else width(self._schema)
        return max(1, int(SLICE_BYTES / max(row, 1)))

    def _rows(self, rows: Indices) -> pa.Table:
        of, places = self._table_of[rows], self._place_of[rows]
        failed = of == len(self._tables)
        if not failed.any():
            return self._gather.rows(of, places, self._schema.empty_table())
        failures = [self._failures[place] for place in places[failed].tolist()]
        places[failed] = np.arange(len(failures))
        return self._gather.rows(of, places, null_rows(self._schema, failures))


def _whole(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """The columns of the result; no computed row has an error."""
    none = pa.nulls(len(table), pa.string())
    held = [none if name == ERROR else table[name] for name in schema.names]
    return pa.Table.from_arrays(held, schema=schema)


def width(schema: pa.Schema) -> int:
    """Bytes of a row, not counting what has no fixed size."""
    return sum(value_bytes(field.type) for field in schema)
