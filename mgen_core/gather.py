"""Rows of several tables in a given order: wide ones are copied once, from where they lie."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from .columns import numbers
from .selection import Indices, take

WIDE = 512  # bytes of a row, about, from which copying it by itself costs less than Arrow's `take`


class Lying(NamedTuple):
    """A column of vectors as bytes: row i is `data[bounds[i] : bounds[i + 1]]`."""

    data: memoryview
    bounds: Indices


@dataclass(frozen=True)
class Gather:
    """Tables of one schema, of one chunk a column; `wide` are the columns that lie in them."""

    tables: Sequence[pa.Table]
    wide: dict[str, list[Lying]]

    def rows(self, of: Indices, places: Indices, nulls: pa.Table) -> pa.Table:
        """Row `places[i]` of table `of[i]`; the number behind the last table is that of `nulls`.

        These have null in each wide column.
        """
        narrow = [name for name in nulls.column_names if name not in self.wide]
        taken = self._taken(narrow, of, places, nulls.select(narrow))
        columns = [
            self._copied(field, of, places) if field.name in self.wide else taken[field.name]
            for field in nulls.schema
        ]
        return pa.Table.from_arrays(columns, schema=nulls.schema)

    def _taken(
        self, names: Sequence[str], of: Indices, places: Indices, nulls: pa.Table
    ) -> pa.Table:
        """Narrow columns, taken table by table, then put in order."""
        by_table = np.argsort(of, kind="stable")
        bounds = np.searchsorted(of[by_table], np.arange(len(self.tables) + 2)).tolist()
        found = [nulls[:0]]
        for table, start, stop in zip([*self.tables, nulls], bounds, bounds[1:]):
            if start < stop:
                found.append(take(table.select(names), places[by_table[start:stop]]))
        back = np.empty_like(by_table)
        back[by_table] = np.arange(len(of))
        return take(pa.concat_tables(found).combine_chunks(), back)

    def _copied(self, field: pa.Field, of: Indices, places: Indices) -> pa.Array:
        """A wide column."""
        found, ragged = self.wide[field.name], pa.types.is_list(field.type)
        vector = value_bytes(field.type.value_type if ragged else field.type)
        starts, stops = np.zeros_like(places), np.zeros_like(places)
        for number in np.unique(of).tolist():
            here = np.flatnonzero(of == number)
            if number == len(found):  # a null vector takes the room of one
                stops[here] = 0 if ragged else vector
            else:
                starts[here] = found[number].bounds[places[here]]
                stops[here] = found[number].bounds[places[here] + 1]
        sources = [one.data for one in found] + [memoryview(bytes(vector))]
        ends = np.concatenate([[0], np.cumsum(stops - starts)])
        copied = np.empty(int(ends[-1]), np.uint8)
        whole, begin = copied.data, 0
        rows = zip(ends[1:].tolist(), of.tolist(), starts.tolist(), stops.tolist())
        for end, number, start, stop in rows:
            whole[begin:end] = sources[number][start:stop]
            begin = end
        return made(field.type, pa.py_buffer(copied), ends // vector, of == len(found))


def gather(tables: Sequence[pa.Table]) -> Gather:
    """What puts rows of these tables in order."""
    wide: dict[str, list[Lying]] = {}
    rows = sum(map(len, tables))
    for name in tables[0].column_names if rows else ():
        found = [one for table in tables if (one := lying(table[name].chunk(0))) is not None]
        if len(found) == len(tables) and sum(len(one.data) for one in found) >= WIDE * rows:
            wide[name] = found
    return Gather(tables, wide)


def lying(column: pa.Array) -> Lying | None:
    """A FixedSizeList of numbers, of any depth, or a List of those, as it lies; else None.

    Nothing of it may be null.
    """
    inner, bounds = column, np.arange(len(column) + 1)
    if pa.types.is_list(column.type):
        offsets = np.frombuffer(column.buffers()[1], np.int32)
        bounds = offsets[column.offset : column.offset + len(column) + 1].astype(np.int64)
        inner = column.flatten()
    if column.null_count or not pa.types.is_fixed_size_list(inner.type):
        return None
    size = value_bytes(inner.type)
    while pa.types.is_fixed_size_list(inner.type):
        if inner.null_count:
            return None
        inner = inner.flatten()
    number = inner.type
    if inner.null_count or not (pa.types.is_floating(number) or pa.types.is_integer(number)):
        return None
    width = number.bit_width // 8
    begin = inner.offset * width
    data = memoryview(inner.buffers()[1]).cast("B")[begin : begin + len(inner) * width]
    return Lying(data, (bounds - bounds[0]) * size)


def made(of: pa.DataType, data: pa.Buffer, ends: Indices, null: np.ndarray) -> pa.Array:
    """The column of which this is the data; `ends` are the vectors' number up to each row."""
    mask = pa.array(null) if null.any() else None
    if not pa.types.is_list(of):
        return _vectors(of, data, mask)
    offsets = numbers(ends.astype(np.int32))
    return pa.ListArray.from_arrays(offsets, _vectors(of.value_type, data), type=of, mask=mask)


def _vectors(of: pa.DataType, data: pa.Buffer, mask: pa.Array | None = None) -> pa.Array:
    if not pa.types.is_fixed_size_list(of):
        return pa.Array.from_buffers(of, data.size * 8 // of.bit_width, [None, data])
    return pa.FixedSizeListArray.from_arrays(_vectors(of.value_type, data), type=of, mask=mask)


def value_bytes(of: pa.DataType) -> int:
    """Bytes of a value of this type; 8 of what has no fixed size."""
    if pa.types.is_fixed_size_list(of):
        return int(of.list_size) * value_bytes(of.value_type)
    return max(of.bit_width // 8, 1) if pa.types.is_primitive(of) else 8
