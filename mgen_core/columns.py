"""Columns of a batch, on the CPU, as an Arrow table: one row for each row of the input."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import pyarrow as pa

from .errors import MgenError
from .kept import TEXT, as_kind, common
from .plan import NOT_FINITE, Batch, Failure

BFLOAT16 = {b"mgen.dtype": b"bfloat16"}
ROW, ID, ERROR = "row", "id", "error"


@dataclass(frozen=True)
class HostColumn:
    """A column off the device: (n, ...) values, or (sum of lengths, ...) with `lengths`.

    bfloat16, which numpy lacks, is uint16 with `bfloat16` set. A list is text or numbers.
    """

    values: np.ndarray[Any, Any] | list[Any]
    lengths: np.ndarray[Any, Any] | None = None
    bfloat16: bool = False

    def __len__(self) -> int:
        return len(self.values if self.lengths is None else self.lengths)

    @property
    def nbytes(self) -> int:
        """Of the numbers."""
        return 0 if isinstance(self.values, list) else self.values.nbytes

    def finite(self) -> np.ndarray[Any, Any]:
        """(n,) bool: entries without NaN or infinity."""
        if isinstance(self.values, list) or not (self.bfloat16 or self.values.dtype.kind == "f"):
            return np.ones(len(self), dtype=bool)
        good = (self.values & 0x7F80) != 0x7F80 if self.bfloat16 else np.isfinite(self.values)
        by_value = good.all(axis=tuple(range(1, good.ndim)))
        if self.lengths is None:
            return np.asarray(by_value)
        bad = np.concatenate(([0], np.cumsum(~by_value)))
        ends = np.cumsum(self.lengths)
        return np.asarray(bad[ends] == bad[ends - self.lengths])


def to_table(
    batch: Batch,
    columns: Mapping[str, HostColumn],
    metadata: Mapping[str, str],
    stored: str,
    reasons: Mapping[int, str] = MappingProxyType({}),
    kept: Mapping[str, Collection[str]] = MappingProxyType({}),
) -> tuple[pa.Table, list[Failure]]:
    """The batch's rows with their columns, and in order those without, or not finite.

    `reasons` are of the entries that have no columns, by their place. Equal rows were computed
    once; here each gets its own copy. A table without rows may lack columns. `kept` are columns of
    the input, with the kinds of all their values in it.
    """
    computed = [entry for place, entry in enumerate(batch.entries) if place not in reasons]
    good = np.logical_and.reduce([column.finite() for column in columns.values()], initial=True)
    bad = [(batch.entries[place], reason) for place, reason in reasons.items()]
    bad += [
        (entry, f"{NOT_FINITE} in {stored} (NaN or infinity)")
        for entry, finite in zip(computed, np.broadcast_to(good, len(computed)))
        if not finite
    ]
    failures = sorted(
        Failure(row.index, row.id, reason) for entry, reason in bad for row in entry.rows
    )
    fine = np.flatnonzero(np.broadcast_to(good, len(computed))).tolist()
    take = [number for number in fine for _ in computed[number].rows]
    rows = [row for number in fine for row in computed[number].rows]
    fields = [pa.field(ROW, pa.int64(), nullable=False), pa.field(ID, pa.string(), nullable=False)]
    arrays: list[pa.Array] = [
        numbers(np.array([row.index for row in rows], dtype=np.int64)),
        texts([row.id for row in rows]),
    ]
    for name, column in columns.items():
        array = to_array(column)
        if take != list(range(len(column))):
            array = array.take(numbers(np.array(take, dtype=np.int64)))
        arrays.append(array)
        fields.append(pa.field(name, array.type, metadata=BFLOAT16 if column.bfloat16 else None))
    for name, kinds in kept.items():
        if name in columns:
            what = f"--keep {name}: the result has a column {name!r} of its own"
            raise MgenError(what, "leave it out, or rename it in the input")
        arrays.append(of_kind([row.kept[name] for row in rows], common(kinds)))
        fields.append(pa.field(name, arrays[-1].type))
    schema = pa.schema(fields, metadata=dict(metadata) or None)
    return pa.Table.from_arrays(arrays, schema=schema), failures


def end_to_end(pieces: Sequence[Mapping[str, HostColumn]]) -> dict[str, HostColumn]:
    """The columns of several sets of rows as those of one."""
    if len(pieces) <= 1:
        return dict(pieces[0]) if pieces else {}
    return {name: _end_to_end([piece[name] for piece in pieces]) for name in pieces[0]}


def _end_to_end(pieces: Sequence[HostColumn]) -> HostColumn:
    first = pieces[0]
    if isinstance(first.values, list):
        return HostColumn([value for piece in pieces for value in piece.values])
    lengths = None
    if first.lengths is not None:
        lengths = np.concatenate([piece.lengths for piece in pieces if piece.lengths is not None])
    return HostColumn(np.concatenate([p.values for p in pieces]), lengths, first.bfloat16)


def to_array(column: HostColumn) -> pa.Array:
    """Entries as Arrow: nested fixed-size lists, inside a list when ragged; numbers not copied."""
    if isinstance(column.values, list):
        return pa.array(column.values)
    array = numbers(np.ascontiguousarray(column.values).reshape(-1))
    for size in reversed(column.values.shape[1:]):
        array = pa.FixedSizeListArray.from_arrays(array, size)
    if column.lengths is None:
        return array
    offsets = np.concatenate(([0], np.cumsum(column.lengths))).astype(np.int32)
    return pa.ListArray.from_arrays(numbers(offsets), array)


def numbers(values: np.ndarray[Any, Any]) -> pa.Array:
    """A vector as Arrow, not copied. (`pa.array` would import pandas: a third of a second.)"""
    kind = pa.from_numpy_dtype(values.dtype)
    return pa.Array.from_buffers(kind, len(values), [None, pa.py_buffer(values)])


def texts(values: Sequence[str]) -> pa.Array:
    """Strings as Arrow, likewise."""
    encoded = [value.encode() for value in values]
    ends = np.cumsum([0, *map(len, encoded)], dtype=np.int32)
    return pa.StringArray.from_buffers(
        len(values), pa.py_buffer(ends), pa.py_buffer(b"".join(encoded))
    )


KINDS = {TEXT: pa.string(), "bool": pa.bool_(), "int": pa.int64(), "float": pa.float64()}


def of_kind(values: Sequence[Any], kind: str) -> pa.Array:
    """A kept column as Arrow."""
    return pa.array([as_kind(value, kind) for value in values], KINDS[kind])


def null_rows(schema: pa.Schema, failures: Sequence[Failure]) -> pa.Table:
    """Failed rows as a table of `schema`: row, id and error told, everything else null."""
    told = {
        ROW: [failure.row for failure in failures],
        ID: [failure.id for failure in failures],
        ERROR: [failure.reason for failure in failures],
    }
    arrays = [
        pa.array(told[field.name], field.type)
        if field.name in told
        else pa.nulls(len(failures), field.type)
        for field in schema
    ]
    return pa.Table.from_arrays(arrays, schema=schema)
