"""Vectors that mgen writes into Parquet itself: whatever reads Parquet must read them."""

from __future__ import annotations

import io
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mgen_formats.writers import pages, rowgroups, thrift

from mgen_core import RunError, WriterCard
from mgen_core.catalog import discover

CARD = discover().find(WriterCard, "parquet")
DTYPES = {"float16": pa.float16(), "float32": pa.float32(), "float64": pa.float64()}


def written(table: pa.Table, cuts: int = 1) -> bytes:
    file = io.BytesIO()
    step = max(1, -(-len(table) // cuts))
    pieces = [table[first : first + step] for first in range(0, len(table), step)]
    CARD.load(CARD).write(file, pieces, table.schema)
    return file.getvalue()


def read(content: bytes, columns: list[str] | None = None) -> pa.Table:
    return CARD.load(CARD).read(pa.BufferReader(content), columns)


def noise(count: int, dtype: str) -> Any:
    """Numbers that are not worth compressing."""
    return np.random.default_rng(count).standard_normal(count).astype(dtype)


def vectors(rows: list[int | None], size: int, dtype: str, *, ragged: bool) -> pa.Array:
    """A row of so many vectors, or of one; None is a null row."""
    of = pa.list_(DTYPES[dtype], size)
    count = sum((row or 0) if ragged else row is not None for row in rows)
    held = pa.FixedSizeListArray.from_arrays(pa.array(noise(count * size, dtype)), type=of)
    found, begin = [], 0
    for row in rows:
        if row is None:
            found.append(pa.nulls(1, pa.list_(of) if ragged else of))
        elif ragged:
            some = held[begin : begin + row]
            found.append(pa.ListArray.from_arrays([0, row], some, type=pa.list_(of)))
            begin += row
        else:
            found.append(held[begin : begin + 1])
            begin += 1
    return pa.concat_arrays(found) if found else pa.nulls(0, pa.list_(of) if ragged else of)


def table(column: pa.Array, *, nullable: bool = True) -> pa.Table:
    texts = pa.array([f"row-{n}" for n in range(len(column))], pa.string())
    fields = [
        pa.field("row", pa.int64(), nullable=False),
        pa.field("embedding", column.type, nullable=nullable),
        pa.field("id", pa.string()),
    ]
    numbers = pa.array(np.arange(len(column)))
    schema = pa.schema(fields, {"mgen.task": "embed"})
    return pa.Table.from_arrays([numbers, column, texts], schema=schema)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.one_of(st.none(), st.integers(0, 4)), max_size=12),
    size=st.sampled_from([1, 2, 5, 64, 200]),
    dtype=st.sampled_from(sorted(DTYPES)),
    ragged=st.booleans(),
    cuts=st.integers(1, 4),
    skip=st.integers(0, 3),
)
def test_arrow_reads_what_was_written(
    rows: list[int | None], size: int, dtype: str, ragged: bool, cuts: int, skip: int
) -> None:
    given = table(vectors(rows, size, dtype, ragged=ragged))[skip:]
    content = written(given, cuts)
    for found in (pq.read_table(pa.BufferReader(content)), read(content)):
        assert found.equals(given)
        assert found.schema.metadata == given.schema.metadata


@pytest.mark.parametrize("dtype", sorted(DTYPES))
@pytest.mark.parametrize("ragged", [False, True])
def test_duckdb_reads_the_file(tmp_path: Any, dtype: str, ragged: bool) -> None:
    rows: list[int | None] = [3, None, 1, 0, 2, 700]
    given = table(vectors(rows, 7, dtype, ragged=ragged))
    path = tmp_path / "a.parquet"
    path.write_bytes(written(given))
    found = duckdb.sql(f"select embedding from '{path}'").fetchall()
    assert [plain(row) for (row,) in found] == plain(given["embedding"].to_pylist())


def plain(value: Any) -> Any:
    return list(map(plain, value)) if isinstance(value, (list, tuple)) else value


@pytest.mark.parametrize("nullable", [False, True])
@pytest.mark.parametrize("ragged", [False, True])
def test_pages_are_used_where_they_lie(ragged: bool, nullable: bool) -> None:
    given = table(vectors([3, 1, 4, 1, 5], 300, "float32", ragged=ragged), nullable=nullable)
    content = pa.py_buffer(written(given))
    found = CARD.load(CARD).read(pa.BufferReader(content))
    assert found.equals(given)
    data = found["embedding"].chunk(0).buffers()[-1]
    assert content.address <= data.address < content.address + content.size
    assert (data.address - content.address) % rowgroups.ALIGNED == 0


def test_a_file_of_arrow_is_read_as_well() -> None:
    given = table(vectors([3, 1, None, 0], 30, "float16", ragged=True))
    file = io.BytesIO()
    pq.write_table(given, file, compression="none", use_dictionary=False)
    assert read(file.getvalue()).equals(given)


def test_what_is_null_inside_a_vector_is_kept() -> None:
    hole = pa.array([[1.0, None], [2.0, 3.0]], pa.list_(pa.float32(), 2))
    none = pa.array([[[1.0, 2.0], None]], pa.list_(pa.list_(pa.float32(), 2)))
    for column in (hole, none):
        given = table(column)
        assert read(written(given)).equals(given)


def test_a_page_whose_levels_were_changed_is_left_to_arrow() -> None:
    """No byte of the levels may be other than what they are made of."""
    of = pages.Vectors(pa.field("e", pa.list_(pa.list_(pa.float32(), 3))))
    column = vectors([2, 1, 3], 3, "float32", ragged=True)
    made = pages.page(of, pa.chunked_array([column]))
    assert made is not None
    content = made.head + b"".join(made.numbers)
    assert pages.column(of, pa.py_buffer(content), 3).equals(column)
    header = len(made.head) - 4 - len(of.repetitions(np.zeros(6), np.ones(6, bool)))
    for place in range(len(made.head)):
        changed = bytearray(content)
        changed[place] ^= 1
        try:
            found = pages.column(of, pa.py_buffer(bytes(changed)), 3)
        except (ValueError, IndexError, KeyError, TypeError):
            assert place < header
            continue
        # A flip of "goes on with its row" makes other rows, which the count of rows tells.
        assert found is None


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=80))
def test_bytes_are_a_struct_or_refused(data: bytes) -> None:
    try:
        found = thrift.Reading(data).struct()
    except (ValueError, IndexError, RecursionError):
        return
    assert thrift.Reading(thrift.dumped(found)).struct() == found


def test_a_footer_is_written_as_it_was_read() -> None:
    file = io.BytesIO()
    pq.write_table(table(vectors([1, 2], 3, "float32", ragged=True)), file)
    content = file.getvalue()
    size = int.from_bytes(content[-8:-4], "little")
    footer = content[-8 - size : -8]
    assert thrift.dumped(thrift.Reading(footer).struct()) == footer


def test_a_damaged_file_is_refused() -> None:
    content = written(table(vectors([1, 2], 3, "float32", ragged=True)))
    for cut in range(0, len(content), 7):
        with pytest.raises(RunError):
            read(content[:cut])
