"""parquet: streamed in row groups whose cuts depend on the rows alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mgen_core import Writer

from .arrays import Array
from .intact import intact
from .kind import refuse_bfloat16

# Of a row group, before compression. Encoding it takes about ten times as much memory.
GROUP_BYTES = 32 << 20


class ParquetWriter(Writer):
    """Writes any Arrow type but bfloat16. Memory: one table, and about 300 MB for a row group.

    Equal rows give equal bytes, however the stream is cut into tables.
    """

    def write(self, file: BinaryIO, tables: Iterable[pa.Table], schema: pa.Schema) -> None:
        refuse_bfloat16(schema, self.card.name)
        with pq.ParquetWriter(file, schema, **_layout(schema)) as written:
            for group in groups(tables, schema):
                written.write_table(group, row_group_size=len(group))

    def read(self, file: BinaryIO) -> pa.Table:
        with intact(self.card.name), pq.ParquetFile(file) as found:
            return found.read()


def _layout(schema: pa.Schema) -> dict[str, object]:
    # Numbers of a network are noise to a dictionary and to statistics, and both cost time. Split
    # into byte planes they compress: float32 to 84 %, what was computed in bfloat16 to a third.
    plain = [field.name for field in schema if not pa.types.is_nested(field.type)]
    wide = [leaf for field in schema for leaf in _floats(field.name, field.type)]
    return {
        "compression": "zstd",
        "compression_level": 1,
        "use_dictionary": [name for name in plain if pa.types.is_string(schema.field(name).type)],
        "write_statistics": plain,
        "use_byte_stream_split": wide,
    }


def _floats(path: str, of: pa.DataType) -> Iterator[str]:
    """Parquet's paths of the float32 and float64 leaves (DuckDB cannot read split float16)."""
    if pa.types.is_list(of) or pa.types.is_fixed_size_list(of):
        yield from _floats(f"{path}.list.element", of.value_type)
    elif pa.types.is_float32(of) or pa.types.is_float64(of):
        yield path


def groups(tables: Iterable[pa.Table], schema: pa.Schema) -> Iterator[pa.Table]:
    """The rows cut anew: a group ends where the bytes of all rows so far pass a multiple."""
    held: list[pa.Table] = []
    size = 0
    for table in tables:
        ends = size + np.cumsum(_sizes(table))
        changes = np.diff(ends // GROUP_BYTES, prepend=size // GROUP_BYTES)
        begin = 0
        for cut in np.flatnonzero(changes).tolist():
            yield from _joined([*held, table.slice(begin, cut - begin)], schema)
            held, begin = [], cut
        held.append(table.slice(begin))
        size = int(ends[-1]) if len(ends) else size
    yield from _joined(held, schema)


def _joined(held: list[pa.Table], schema: pa.Schema) -> Iterator[pa.Table]:
    # One chunk a column: the pages inside a group would follow the chunks.
    group = pa.concat_tables([pa.Table.from_batches([], schema), *held])
    if len(group):
        yield group.combine_chunks()


def _sizes(table: pa.Table) -> Array:
    """Bytes of each row, about."""
    sizes = np.zeros(len(table), np.int64)
    for column in table.columns:
        chunks = [_bytes(chunk) for chunk in column.chunks]
        sizes += np.concatenate(chunks) if chunks else 0
    return sizes


def _bytes(array: pa.Array) -> Array:
    of = array.type
    width = _width(of)
    if width is not None:
        return np.full(len(array), width, np.int64)
    if pa.types.is_fixed_size_list(of):
        inner = _bytes(array.values.slice(array.offset * of.list_size, len(array) * of.list_size))
        found = inner.reshape(len(array), of.list_size).sum(1)
    elif pa.types.is_list(of):
        ends = np.concatenate([np.zeros(1, np.int64), np.cumsum(_bytes(array.values))])
        found = np.diff(ends[_offsets(array)])
    else:
        found = np.diff(_offsets(array))
    return np.asarray(found, np.int64)


def _offsets(array: pa.Array) -> Array:
    """Where each list or text begins and the last one ends.

    From the buffer: Arrow's own `to_numpy` imports pandas, a third of a second at every start.
    """
    if not len(array):
        return np.zeros(1, np.int32)
    stored = np.frombuffer(array.buffers()[1], np.int32)
    return stored[array.offset : array.offset + len(array) + 1]


def _width(of: pa.DataType) -> int | None:
    """Bytes of a value whose type alone decides, half floats counted as floats; else None."""
    if pa.types.is_fixed_size_list(of):
        inner = _width(of.value_type)
        return None if inner is None else inner * of.list_size
    if pa.types.is_list(of) or pa.types.is_string(of) or pa.types.is_binary(of):
        return None
    return max(of.bit_width // 8, 4) if pa.types.is_primitive(of) else 8
