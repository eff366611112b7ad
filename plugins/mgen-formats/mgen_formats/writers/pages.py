"""Vectors as a page of a Parquet file: the numbers as they lie in memory, and few bytes of levels.

Arrow writes and reads two levels for each number of a vector, which takes several times as long as
the numbers do. But the levels of a vector are the same run each time: here they are made, and
recognized, by the vector. A column is FixedSizeList of floats, or List of those, and may be null.

Levels say how the numbers are nested. *Repetition*: 0 begins a row, 1 a vector of the same row (in
a List), the highest goes on in the vector. *Definition*: the highest is a number, 0 a row that is
null. (parquet-format: Encodings.md, Data Pages in README.md)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from . import thrift
from .arrays import Array
from .thrift import Struct

MOST_BYTES = 2**30  # of a page, whose size is a 32-bit number
PLAIN, RLE = 0, 3  # encodings
PHYSICAL = {pa.float16(): 7, pa.float32(): 4, pa.float64(): 5}


@dataclass(frozen=True)
class Vectors:
    """How a column of vectors is nested in a Parquet file."""

    field: pa.Field

    @property
    def ragged(self) -> bool:
        """Whether a row is a list of vectors."""
        return bool(pa.types.is_list(self.field.type))

    @property
    def vector(self) -> pa.DataType:
        """FixedSizeList."""
        return self.field.type.value_type if self.ragged else self.field.type

    @property
    def leaf(self) -> pa.DataType:
        """Type of the numbers."""
        return self.vector.value_type

    @property
    def repetition(self) -> int:
        """The highest repetition level."""
        return 2 if self.ragged else 1

    @property
    def definition(self) -> int:
        """The highest definition level."""
        fields = [self.field, self.vector.value_field]
        fields += [self.field.type.value_field] if self.ragged else []
        return self.repetition + sum(int(field.nullable) for field in fields)

    @property
    def path(self) -> list[bytes]:
        """Of the numbers, in Parquet's schema."""
        return [self.field.name.encode(), *[b"list", b"element"] * self.repetition]

    def repetitions(self, first: Array, real: Array) -> bytes:
        """Repetition levels of vectors (`real`) and of rows without one, as runs.

        `first` is 1 where a vector goes on with its row.
        """
        size = self.vector.list_size
        rest = thrift.varint((size - 1) << 1) + bytes([self.repetition]) if size > 1 else b""
        runs = np.empty((len(first), 2 + len(rest)), np.uint8)
        runs[:] = np.frombuffer(bytes([1 << 1, 0]) + rest, np.uint8)
        runs[:, 1] = first
        if real.all():
            return runs.tobytes()
        kept = np.repeat(real[:, None], 2 + len(rest), axis=1)
        kept[:, :2] = True
        return bytes(runs[kept].data)

    def definitions(self, level: Array, real: Array) -> bytes:
        """Definition levels of the same, as runs."""
        counts = np.where(real, self.vector.list_size, 1)
        starts = np.flatnonzero(np.diff(level, prepend=-1))
        totals = np.add.reduceat(counts, starts)
        return b"".join(
            thrift.varint(total << 1) + bytes([value])
            for total, value in zip(totals.tolist(), level[starts].tolist())
        )


class Page(NamedTuple):
    """A column of a row group: `head` and then `numbers` are its bytes in the file."""

    head: bytes
    numbers: list[memoryview]
    values: int

    @property
    def size(self) -> int:
        """Of both, in bytes."""
        return len(self.head) + sum(len(some) for some in self.numbers)


def vectors(field: pa.Field) -> Vectors | None:
    """How a column is nested, or None where it is no column of vectors."""
    found = Vectors(field)
    if not (found.ragged or pa.types.is_fixed_size_list(field.type)):
        return None
    if not pa.types.is_fixed_size_list(found.vector):
        return None
    return found if found.leaf in PHYSICAL and found.vector.list_size else None


def page(of: Vectors, column: pa.ChunkedArray) -> Page | None:
    """The rows as one page, their numbers not copied; None where that is not possible."""
    found = [_numbers(of, chunk) for chunk in column.chunks]
    numbers = [some for some in found if some is not None]
    size = sum(map(len, numbers))
    if len(numbers) < len(found) or not 0 < size <= MOST_BYTES:
        return None
    first, level = map(np.concatenate, zip(*(_units(of, chunk) for chunk in column.chunks)))
    real = level == of.definition
    levels = _sized(of.repetitions(first, real)) + _sized(of.definitions(level, real))
    values = size * 8 // of.leaf.bit_width + int(np.count_nonzero(~real))
    return Page(_header(values, len(levels) + size) + levels, numbers, values)


def _numbers(of: Vectors, column: pa.Array) -> memoryview | None:
    """The bytes of all numbers; None where one is null."""
    held = inner(column) if of.ragged else column
    if of.ragged and held.null_count:
        return None
    found = inner(held)
    if found.null_count:
        return None
    width = of.leaf.bit_width // 8
    start = found.offset * width
    data = memoryview(found.buffers()[1] or b"").cast("B")
    return data[start : start + len(found) * width]


def inner(lists: pa.Array) -> pa.Array:
    """What is in the lists, end to end; Arrow's own `flatten` imports much for one call."""
    if lists.null_count or not len(lists):
        return lists.flatten()
    if pa.types.is_list(lists.type):
        ends = np.frombuffer(lists.buffers()[1], np.int32)[lists.offset :]
        return lists.values[ends[0] : ends[len(lists)]]
    size = lists.type.list_size
    return lists.values[lists.offset * size : (lists.offset + len(lists)) * size]


def _units(of: Vectors, column: pa.Array) -> tuple[Array, Array]:
    """The vectors and the rows without one: 1 where a row goes on, and the definition level."""
    valid = np.ones(len(column), bool)
    if column.null_count:
        valid = np.frombuffer(column.is_valid().cast(pa.uint8()).buffers()[1], bool)[: len(column)]
    if not of.ragged:
        return np.zeros(len(column), np.uint8), np.where(valid, of.definition, 0)
    stored = np.frombuffer(column.buffers()[1], np.int32)
    lengths = np.diff(stored[column.offset : column.offset + len(column) + 1]) * valid
    units = np.maximum(lengths, 1)
    first = np.ones(int(units.sum()), np.uint8)
    first[np.cumsum(units) - units] = 0
    empty = int(of.field.nullable)
    return first, np.repeat(np.where(lengths > 0, of.definition, empty * valid), units)


def _sized(levels: bytes) -> bytes:
    return len(levels).to_bytes(4, "little") + levels


def _header(values: int, size: int) -> bytes:
    """A PageHeader of an uncompressed data page."""
    i32 = thrift.I32
    data = {1: (i32, values), 2: (i32, PLAIN), 3: (i32, RLE), 4: (i32, RLE)}
    of_page: Struct = {1: (i32, 0), 2: (i32, size), 3: (i32, size), 5: (thrift.STRUCT, data)}
    return thrift.dumped(of_page)


def metadata(of: Vectors, made: Page, at: int) -> Struct:
    """ColumnMetaData of the page that begins at this byte of the file."""
    return {
        1: (thrift.I32, PHYSICAL[of.leaf]),
        2: (thrift.LIST, (thrift.I32, [PLAIN, RLE])),
        3: (thrift.LIST, (thrift.BINARY, of.path)),
        4: (thrift.I32, 0),  # not compressed
        5: (thrift.I64, made.values),
        6: (thrift.I64, made.size),
        7: (thrift.I64, made.size),
        9: (thrift.I64, at),
    }


def column(of: Vectors, content: pa.Buffer, rows: int) -> pa.Array | None:
    """The rows of a page, of which none is null, their numbers not copied.

    None where the bytes are not exactly what `page` makes of such rows.
    """
    reading = thrift.Reading(content[:64].to_pybytes())
    header = reading.struct()
    if 5 not in header:  # no data page of the first version
        return None
    values = header[5][1][1][1]
    size, width = of.vector.list_size, of.leaf.bit_width // 8
    start = len(content) - values * width
    if values <= 0 or start < 0 or values % size:
        return None
    head = content[:start].to_pybytes()
    first = _first(of, head[reading.at :], values // size)
    if first is None or first[0] or first.max() > of.ragged:
        return None
    real = np.ones(len(first), bool)
    level = np.full(len(first), of.definition)
    levels = _sized(of.repetitions(first, real)) + _sized(of.definitions(level, real))
    starts = np.flatnonzero(first == 0)
    same = head == _header(values, len(levels) + values * width) + levels
    if not same or len(starts) != rows:
        return None
    numbers = pa.Array.from_buffers(of.leaf, values, [None, content[start:]])
    held = pa.FixedSizeListArray.from_arrays(numbers, type=of.vector)
    if not of.ragged:
        return held
    ends = pa.py_buffer(np.append(starts, len(first)).astype(np.int32))
    offsets = pa.Array.from_buffers(pa.int32(), rows + 1, [None, ends])
    return pa.ListArray.from_arrays(offsets, held, type=of.field.type)


def _first(of: Vectors, levels: bytes, count: int) -> Array | None:
    """Where each of so many vectors goes on with its row, if they all have the same runs."""
    stride = len(of.repetitions(np.zeros(1, np.uint8), np.ones(1, bool)))
    runs = levels[4 : 4 + count * stride]
    if not count or len(runs) < count * stride:
        return None
    return np.frombuffer(runs, np.uint8).reshape(count, stride)[:, 1]
