"""Arrow columns as NumPy arrays and back, for the formats that hold arrays."""

from __future__ import annotations

import base64
import contextlib
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from mgen_core import MgenError, Writer

from .kind import Kind, kind

Array = NDArray[Any]

SCHEMA = "mgen.arrow_schema"  # key of the metadata: types for `read`, in base64
NAN16 = 0x7FC0  # NaN in the bits of a bfloat16
SOME = 4096  # texts at a time


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
        for first in range(0, self.rows, SOME):
            some = slice(first, first + SOME)
            ends = bounds[1:][some].tolist()
            for row, (start, stop) in enumerate(zip(bounds[some].tolist(), ends), first):
                entry = self.values[row] if self.lengths is None else self.values[start:stop]
                yield entry if valid[row] else None

    def texts(self) -> list[str | None]:
        """The entries of a text column."""
        return [None if entry is None else entry.tobytes().decode() for entry in self.entries()]

    def some_texts(self) -> Iterator[list[str]]:
        """The same a few at a time, null as an empty one."""
        entries = self.entries()
        while some := list(islice(entries, SOME)):
            yield ["" if entry is None else entry.tobytes().decode() for entry in some]

    @property
    def rows(self) -> int:
        return len(self.values if self.lengths is None else self.lengths)


@contextlib.contextmanager
def columns(
    tables: Iterable[pa.Table], schema: pa.Schema, writer: Writer
) -> Iterator[list[tuple[pa.Field, Kind, Flat]]]:
    """The columns of all tables together. Types are checked before a table is taken.

    Their arrays are temporary files, mapped: a stream may be larger than memory.
    """
    kinds = [kind(field, writer.card.name) for field in schema]
    with contextlib.ExitStack() as files:
        spools = [Spool(of, writer.scratch, files) for of in kinds]
        for table in tables:
            for spool, column in zip(spools, table.columns):
                spool.add(column)
        yield [(field, of, spool.flat()) for field, of, spool in zip(schema, kinds, spools)]


class Spool:
    """The arrays of a column on their way, in files without a name: gone with the process."""

    def __init__(self, of: Kind, folder: Path | None, files: contextlib.ExitStack) -> None:
        self._of = of
        self._values, self._lengths, self._valid = (
            files.enter_context(tempfile.TemporaryFile(dir=folder))  # noqa: SIM115 - closed there
            for _ in range(3)
        )
        self._nulls = False

    def add(self, column: pa.ChunkedArray) -> None:
        """Some more rows."""
        if not len(column):
            return
        flat = flatten(column, self._of)
        self._values.write(flat.values.data)
        self._valid.write((np.ones(flat.rows, bool) if flat.valid is None else flat.valid).data)
        self._nulls = self._nulls or flat.valid is not None
        if flat.lengths is not None:
            self._lengths.write(flat.lengths.data)

    def flat(self) -> Flat:
        """All that came, mapped."""
        of = self._of
        dtype = np.dtype(np.uint8 if of.text else of.leaf.to_pandas_dtype())
        values = _mapped(self._values, dtype).reshape(-1, *of.shape)
        lengths = _mapped(self._lengths, np.dtype(np.int64)) if of.text or of.ragged else None
        return Flat(values, lengths, _mapped(self._valid, np.dtype(bool)) if self._nulls else None)


def _mapped(file: IO[bytes], dtype: np.dtype[Any]) -> Array:
    size = file.tell()
    file.flush()
    return np.memmap(file, dtype, "r+") if size else np.zeros(0, dtype)  # an empty file maps not


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


def schema_of(found: Mapping[str, str], columns: Sequence[str] | None = None) -> pa.Schema:
    """The schema that `metadata` was made from, or some columns of it."""
    schema = pa.ipc.read_schema(pa.py_buffer(base64.b64decode(found[SCHEMA])))
    if columns is None:
        return schema
    return pa.schema([schema.field(name) for name in columns], schema.metadata)
