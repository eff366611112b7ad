"""Arrow columns as NumPy arrays and back, for the formats that hold arrays."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from mgen_core import MgenError

from .kind import Kind, kind

Array = NDArray[Any]

SCHEMA = "mgen.arrow_schema"  # key of the metadata: types for `read`, in base64
NAN16 = 0x7FC0  # NaN in the bits of a bfloat16


@dataclass(frozen=True)
class Flat:
    """A column as arrays.

    - `values`: (n, ...) or, ragged, (sum of lengths, ...); text is UTF-8 in uint8.
    - `lengths`: (n,) int64 of a ragged or text column, else None.
    - `valid`: (n,) bool, False where null; None when nothing is null. A null entry is NaN
      (0 in whole numbers), or has length 0.
    """

    values: Array
    lengths: Array | None = None
    valid: Array | None = None

    @property
    def offsets(self) -> Array:
        """Where each entry of `values` starts, and the end of the last: (n + 1,) int64."""
        assert self.lengths is not None
        return np.concatenate([np.zeros(1, np.int64), np.cumsum(self.lengths)])

    def entries(self) -> Iterator[Array | None]:
        """The entries one by one, None for null."""
        valid = np.ones(self.rows, bool) if self.valid is None else self.valid
        bounds = np.arange(self.rows + 1) if self.lengths is None else self.offsets
        for row, (start, stop) in enumerate(zip(bounds[:-1].tolist(), bounds[1:].tolist())):
            entry = self.values[row] if self.lengths is None else self.values[start:stop]
            yield entry if valid[row] else None

    def texts(self) -> list[str | None]:
        """The entries of a text column."""
        return [None if entry is None else entry.tobytes().decode() for entry in self.entries()]

    @property
    def rows(self) -> int:
        return len(self.values if self.lengths is None else self.lengths)


def columns(
    tables: Iterable[pa.Table], schema: pa.Schema, writer: str
) -> Iterator[tuple[pa.Field, Kind, Flat]]:
    """The columns of all tables together. Types are checked before a table is taken."""
    kinds = [kind(field, writer) for field in schema]
    table = pa.concat_tables([schema.empty_table(), *tables])
    held = [table.column(number) for number in range(len(schema))]
    del table
    for field, of in zip(schema, kinds):
        yield field, of, flatten(held.pop(0), of)  # popped: Arrow's copy goes column by column


def flatten(column: pa.ChunkedArray, of: Kind) -> Flat:
    """A column's arrays, never views of it."""
    valid = column.is_valid().to_numpy() if column.null_count else None
    if of.text:
        texts = [(text or "").encode() for text in column.to_pylist()]
        values = np.frombuffer(bytearray().join(texts), np.uint8)
        return Flat(values, np.fromiter(map(len, texts), np.int64, len(texts)), valid)
    if of.ragged:
        lengths = np.concatenate([_lengths(chunk) for chunk in column.chunks])
        values = np.concatenate([_numbers(chunk.flatten(), of) for chunk in column.chunks])
        return Flat(values, lengths, valid)
    values = np.concatenate([_numbers(chunk, of) for chunk in column.chunks])
    if valid is not None:
        values[~valid] = _missing(of)
    return Flat(values, None, valid)


def _lengths(chunk: pa.ListArray) -> Array:
    lengths: Array = chunk.value_lengths().fill_null(0).to_numpy(zero_copy_only=False)
    return lengths.astype(np.int64)


def _numbers(array: pa.Array, of: Kind) -> Array:
    """(n, *shape) of a fixed-size column; what lies under nulls is arbitrary."""
    rows = len(array)
    for size in of.shape:
        array = array.values.slice(array.offset * size, len(array) * size)
    if array.null_count:
        array = pa.Array.from_buffers(
            array.type, len(array), [None, array.buffers()[1]], offset=array.offset
        )
    found: Array = array.to_numpy(zero_copy_only=False).reshape(rows, *of.shape)
    return found


def _missing(of: Kind) -> Any:
    if of.bfloat16:
        return NAN16
    return np.nan if pa.types.is_floating(of.leaf) else 0


def rebuild(field: pa.Field, of: Kind, flat: Flat) -> pa.Array:
    """The Arrow column that `flatten` came from."""
    if of.text:
        return pa.array(flat.texts(), field.type)
    null = None if flat.valid is None else ~flat.valid
    if not of.ragged and not of.shape:
        return pa.array(flat.values, field.type, mask=null)
    mask = None if null is None else pa.array(null)
    leaves = pa.array(flat.values.reshape(-1), of.leaf)
    if not of.ragged:
        return _nested(leaves, field.type, mask)
    values = _nested(leaves, field.type.value_type)
    offsets = pa.array(flat.offsets, pa.int32())
    return pa.ListArray.from_arrays(offsets, values, type=field.type, mask=mask)


def _nested(leaves: pa.Array, of: pa.DataType, mask: pa.Array | None = None) -> pa.Array:
    if not pa.types.is_fixed_size_list(of):
        return leaves
    values = _nested(leaves, of.value_type)
    return pa.FixedSizeListArray.from_arrays(values, type=of, mask=mask)


def gather(named: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """A dictionary of what is to be saved. Raises `MgenError` when a name occurs twice."""
    found: dict[str, Any] = {}
    for name, value in named:
        if name in found:
            raise MgenError(f"two arrays would be named {name!r}", "use --writer parquet")
        found[name] = value
    return found


def metadata(schema: pa.Schema) -> dict[str, str]:
    """The schema's metadata as text, and the schema itself under `SCHEMA`."""
    plain = {
        key.decode(errors="replace"): value.decode(errors="replace")
        for key, value in sorted((schema.metadata or {}).items())
    }
    return plain | {SCHEMA: base64.b64encode(schema.serialize()).decode()}


def schema_of(found: Mapping[str, str]) -> pa.Schema:
    """The schema that `metadata` was made from."""
    return pa.ipc.read_schema(pa.py_buffer(base64.b64decode(found[SCHEMA])))
