"""parquet: streamed in row groups whose cuts depend on the rows alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mgen_core import Writer

from .arrays import Array
from .intact import intact
from .kind import refuse_bfloat16
from .pages import inner, vectors
from .rowgroups import RowGroups, read_row_group

# Of a row group, before compression. Encoding it takes several times as much memory.
GROUP_BYTES = 16 << 20
SAMPLE_VALUES = 1 << 18  # of a column show whether it is worth compressing
WORTH = 0.75


class ParquetWriter(Writer):
    """Writes any Arrow type but bfloat16. Memory: one table, and some row groups.

    Equal rows give equal bytes, however the stream is cut into tables.
    """

    def write(self, file: BinaryIO, tables: Iterable[pa.Table], schema: pa.Schema) -> None:
        refuse_bfloat16(schema, self.card.name)
        cut = groups(tables, schema)
        first = next(cut, pa.Table.from_batches([], schema))
        written = RowGroups(file, schema, *_layout(first))
        for group in chain([first] if len(first) else [], cut):
            written.add(group)
        written.close()

    def read(self, file: BinaryIO, columns: Sequence[str] | None = None) -> pa.Table:
        source = file if isinstance(file, pa.NativeFile) else pa.PythonFile(file)
        with intact(self.card.name), pq.ParquetFile(source) as found:
            # One by one: Arrow keeps four bytes of levels for every number that it reads at once.
            held = [
                read_row_group(source, found, number, columns)
                for number in range(found.num_row_groups)
            ]
            table = pa.concat_tables(held) if held else found.read(columns)
            return table if columns is None else table.select(list(columns))


def _layout(group: pa.Table) -> tuple[dict[str, object], list[str]]:
    """How the columns are encoded, which the rows of the first group decide.

    That is, Arrow's options, and the columns of vectors that are left as they are.
    """
    # Numbers of a network are noise to a dictionary and to statistics, and both cost time.
    plain = [field.name for field in group.schema if not pa.types.is_nested(field.type)]
    texts = [name for name in plain if pa.types.is_string(group.schema.field(name).type)]
    packed, split, bare = list(plain), [], []
    for name in group.column_names:
        if name not in plain:
            path, leaf = _leaf(name, group.schema.field(name).type)
            if _worth(group[name].combine_chunks(), leaf):
                packed.append(path)
                split += [path] if _splits(leaf) else []
            elif vectors(group.schema.field(name)):
                bare.append(name)
    options = {
        "compression": dict.fromkeys(packed, "zstd"),
        "compression_level": dict.fromkeys(packed, 1),
        "use_dictionary": texts,
        "write_statistics": plain,
        "use_byte_stream_split": split,
        # A vector has hundreds of values, a row of residues a hundred thousand.
        "write_batch_size": 1 << 16,
    }
    return options, bare


def _leaf(path: str, of: pa.DataType) -> tuple[str, pa.DataType]:
    """Parquet's path of the numbers in lists, and their type."""
    while pa.types.is_list(of) or pa.types.is_fixed_size_list(of):
        path, of = f"{path}.list.element", of.value_type
    return path, of


def _splits(leaf: pa.DataType) -> bool:
    """Whether they are stored as byte planes (DuckDB cannot read float16 so)."""
    return bool(pa.types.is_float32(leaf) or pa.types.is_float64(leaf))


def _worth(column: pa.Array, leaf: pa.DataType) -> bool:
    """Whether zstd makes less than three quarters of the numbers.

    Of float32, split into byte planes, it makes 84 % in four times the time that writing them
    takes; of those that were computed in bfloat16 a third; of float16 92 %.
    """
    if not pa.types.is_floating(leaf):
        return True
    values = _first(column, SAMPLE_VALUES)
    planes = np.frombuffer(values.tobytes(), np.uint8)
    if _splits(leaf):
        planes = np.ascontiguousarray(planes.reshape(-1, values.itemsize).T)
    if not planes.size:
        return False
    packed = pa.Codec("zstd", compression_level=1).compress(planes, asbytes=True)
    return len(packed) < WORTH * planes.nbytes


def _first(array: pa.Array, most: int) -> Array:
    """The first numbers in a column of lists."""
    while pa.types.is_nested(array.type):
        size = array.type.list_size if pa.types.is_fixed_size_list(array.type) else 1
        array = inner(array[: -(-most // max(size, 1))])
    if not len(array):
        return np.zeros(0)
    # From the buffer, as `_offsets`.
    stored = np.frombuffer(array.buffers()[1], array.type.to_pandas_dtype())
    return stored[array.offset : array.offset + min(len(array), most)]


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
    group = pa.concat_tables([pa.Table.from_batches([], schema), *held])
    if len(group):
        yield group


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
