"""Arrow columns as the Python values that `Rows.chunks` promises."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa


def chunk(table: pa.Table | pa.RecordBatch, columns: Sequence[str]) -> Mapping[str, list[Any]]:
    """The named columns: text, whole numbers and times as `str`, all else as Python values.

    Raises `pa.ArrowInvalid` for bytes that are no text and values that Python cannot hold.
    """
    return {name: _values(table.column(name)) for name in columns}


def _values(column: pa.Array | pa.ChunkedArray) -> list[Any]:
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if any(told(column.type) for told in TEXT):
        column = column.cast(pa.large_string())
    try:
        found: list[Any] = column.to_pylist()
    except (ValueError, OverflowError) as error:
        raise pa.ArrowInvalid(str(error)) from error
    return found


TEXT = (
    pa.types.is_integer,
    pa.types.is_temporal,
    pa.types.is_decimal,
    pa.types.is_binary,
    pa.types.is_large_binary,
    pa.types.is_fixed_size_binary,
    pa.types.is_binary_view,
)
"""Types that come as text, as they would from a csv."""
