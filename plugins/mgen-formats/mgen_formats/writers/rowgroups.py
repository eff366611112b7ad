"""A Parquet file as it is written and read, a row group at a time.

Columns of vectors that are not compressed are `pages`. Arrow makes all others, each row group of
them as a file in memory whose bytes are copied, and the schema. (parquet.thrift of parquet-format)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from . import thrift
from .pages import Page, Vectors, column, metadata, page, vectors
from .thrift import Struct

MAGIC = b"PAR1"
ALIGNED = 64  # bytes at which the numbers of a page begin, so that they are used where they lie
OFFSETS = {9, 10, 11}  # of data, index and dictionary pages, in ColumnMetaData


class RowGroups:
    """Writes tables of a schema, each as a row group; `layout` are options of Arrow's writer.

    The columns named in `plain` are vectors that are not to be compressed.
    """

    def __init__(
        self, file: BinaryIO, schema: pa.Schema, layout: Mapping[str, Any], plain: Sequence[str]
    ) -> None:
        self._file = file
        self._schema = schema
        self._layout = layout
        self._vectors = {name: Vectors(schema.field(name)) for name in plain}
        self._at = self._rows = 0
        self._groups: list[Struct] = []
        self._put(MAGIC)

    def add(self, table: pa.Table) -> None:
        """A row group."""
        made = {name: page(of, table[name]) for name, of in self._vectors.items()}
        ours = {name: found for name, found in made.items() if found is not None}
        # One chunk a column: Arrow's pages would follow the chunks.
        columns = self._by_arrow(table.drop_columns(list(ours)).combine_chunks())
        for name, found in ours.items():
            columns[name] = [self._as_page(self._vectors[name], found)]
        chunks = [chunk for name in table.column_names for chunk in columns[name]]
        size = sum(_facts(chunk)[6][1] for chunk in chunks)
        listed = (thrift.LIST, (thrift.STRUCT, chunks))
        self._groups.append({1: listed, 2: (thrift.I64, size), 3: (thrift.I64, len(table))})
        self._rows += len(table)

    def close(self) -> None:
        """The end of the file: what is in it and where."""
        _, footer = _file(pa.Table.from_batches([], self._schema), self._layout)
        footer[3] = thrift.I64, self._rows
        footer[4] = thrift.LIST, (thrift.STRUCT, self._groups)
        told = thrift.dumped(footer)
        self._put(told + len(told).to_bytes(4, "little") + MAGIC)

    def _by_arrow(self, table: pa.Table) -> dict[str, list[Struct]]:
        """Write these columns; what the footer tells of each: a struct has several."""
        found: dict[str, list[Struct]] = {}
        if not table.num_columns:
            return found
        content, footer = _file(table, self._layout)
        moved = self._at - len(MAGIC)
        self._put(content[len(MAGIC) :])
        for chunk in footer[4][1][1][0][1][1][1]:
            facts = _facts(chunk)
            for number in OFFSETS & facts.keys():
                facts[number] = thrift.I64, facts[number][1] + moved
            found.setdefault(facts[3][1][1][0].decode(), []).append(_chunk(facts))
        return found

    def _as_page(self, of: Vectors, made: Page) -> Struct:
        """Write a column of vectors; what the footer tells of it."""
        self._put(bytes(-(self._at + len(made.head)) % ALIGNED))
        facts = metadata(of, made, self._at)
        self._put(made.head)
        for some in made.numbers:
            self._put(some)
        return _chunk(facts)

    def _put(self, data: bytes | memoryview) -> None:
        self._file.write(data)
        self._at += len(data)


def _file(table: pa.Table, layout: Mapping[str, Any]) -> tuple[bytes, Struct]:
    """A Parquet file of one row group, or none, without its footer; and the footer."""
    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(sink, table.schema, **layout) as writer:
        if len(table):
            writer.write_table(table, row_group_size=len(table))
    content: bytes = sink.getvalue().to_pybytes()
    size = int.from_bytes(content[-8:-4], "little")
    footer = content[-8 - size : -8]
    return content[: -8 - size], thrift.Reading(footer).struct()


def _facts(chunk: Struct) -> Struct:
    """The ColumnMetaData of a ColumnChunk."""
    found: Struct = chunk[3][1]
    return found


def _chunk(facts: Struct) -> Struct:
    """A ColumnChunk."""
    return {2: (thrift.I64, 0), 3: (thrift.STRUCT, facts)}


def read_row_group(
    source: pa.NativeFile, file: pq.ParquetFile, number: int, columns: Sequence[str] | None
) -> pa.Table:
    """These columns of a row group; those that are `pages` are used where they lie."""
    schema = file.schema_arrow
    fields = [field for field in schema if columns is None or field.name in columns]
    found = {field.name: _page(source, file, number, field) for field in fields}
    others = [name for name, column in found.items() if column is None]
    table = file.read_row_group(number, others, use_threads=False)
    for name in others:
        found[name] = table[name]
    return pa.Table.from_arrays(list(found.values()), schema=pa.schema(fields, schema.metadata))


def _page(
    source: pa.NativeFile, file: pq.ParquetFile, number: int, field: pa.Field
) -> pa.Array | None:
    """A column of a row group, if it is one of our pages."""
    of = vectors(field)
    if of is None:
        return None
    group = file.metadata.row_group(number)
    path = b".".join(of.path).decode()
    for place in range(group.num_columns):
        facts = group.column(place)
        if facts.path_in_schema == path and facts.compression == "UNCOMPRESSED":
            source.seek(facts.data_page_offset)
            return column(of, source.read_buffer(facts.total_compressed_size), group.num_rows)
    return None
