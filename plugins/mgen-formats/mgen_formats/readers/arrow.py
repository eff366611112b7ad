"""Arrow columns as the Python values that `Rows.chunks` promises."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa


def chunk(table: pa.Table | pa.RecordBatch, columns: Sequence[str]) -> Mapping[str, list[Any]]:
    """The named columns: text and whole numbers as `str`, all else as plain Python values."""
    return {name: _values(table.column(name)) for name in columns}


def _values(column: pa.Array | pa.ChunkedArray) -> list[Any]:
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if pa.types.is_integer(column.type):
        column = column.cast(pa.string())
    found: list[Any] = column.to_pylist()
    return found
