"""tsv: a header, a row a line, lists as JSON."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.compute as pc

from mgen_core import Writer

from ..readers.delimited import batches, header
from .arrays import Array, Flat, flatten, rebuild
from .intact import intact
from .kind import Kind, kind, refuse_bfloat16

SLICE = 256  # rows turned into text at a time

_must_quote = re.compile(r'[\t\r\n"]|^$').search


class TsvWriter(Writer):
    """Text that any tool reads. Memory: one table.

    A null is an empty cell, an empty text is `""`; texts with a tab, line end or quote are quoted.
    A ragged list starts with a blank, `[ 1.0,2.0]`, which says List to `read` and nothing to JSON.
    Floats are the shortest text that gives the same number back; those that JSON lacks are
    spelled NaN, Infinity and -Infinity inside lists.
    """

    def write(self, file: BinaryIO, tables: Iterable[pa.Table], schema: pa.Schema) -> None:
        refuse_bfloat16(schema, self.card.name)
        kinds = [kind(field, self.card.name) for field in schema]
        file.write(b"\t".join(map(_quoted, schema.names)) + b"\n")
        for table in tables:
            for start in range(0, len(table), SLICE):
                held = table.slice(start, SLICE).columns
                cells = [_cells(column, of) for column, of in zip(held, kinds)]
                file.writelines(b"\t".join(line) + b"\n" for line in zip(*cells))

    def read(self, file: BinaryIO, columns: Sequence[str] | None = None) -> pa.Table:
        """The table, its types guessed, since text has none.

        `row` is int64, `id` and `error` are strings. Lists are of float32, int64 or bool. Other
        columns are int64, double or bool where every cell is written as one, else strings; a
        column without a value has the type null.
        """
        with intact(self.card.name), tempfile.NamedTemporaryFile(suffix=".tsv") as copy:
            shutil.copyfileobj(file, copy)
            copy.flush()
            path = Path(copy.name)
            _check_end(path)
            names = header(path, "\t")
            held = pa.Table.from_batches(
                batches(path, "\t", names, nulls=True),
                pa.schema([(name, pa.string()) for name in names]),
            )
            wanted = names if columns is None else columns
            return pa.table({name: _typed(name, held.column(name)) for name in wanted})


def _check_end(path: Path) -> None:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        if file.read() != b"\n":
            raise ValueError("it stops inside a line")


def _cells(column: pa.ChunkedArray, of: Kind) -> Iterator[bytes]:
    if of.text:
        return (b"" if text is None else _quoted(text) for text in column.to_pylist())
    if of.ragged or of.shape:
        entries = flatten(column, of).entries()
        return (b"" if entry is None else _json(entry, of.ragged) for entry in entries)
    if pa.types.is_float16(of.leaf):
        column = column.cast(pa.float32())
    return ((text or "").encode() for text in column.cast(pa.string()).to_pylist())


def _quoted(text: str) -> bytes:
    if _must_quote(text):
        text = '"' + text.replace('"', '""') + '"'
    return text.encode()


def _json(entry: Array, ragged: bool) -> bytes:
    text = orjson.dumps(entry, option=orjson.OPT_SERIALIZE_NUMPY)
    # orjson turns NaN and the infinities into null, which would lose them.
    if b"null" in text:
        text = json.dumps(entry.tolist()).encode()
    return b"[ " + text[1:] if ragged else text


def _parsed(cell: str) -> Any:
    try:
        return orjson.loads(cell)
    except orjson.JSONDecodeError:
        return json.loads(cell)


def _typed(name: str, column: pa.ChunkedArray) -> pa.Array | pa.ChunkedArray:
    if name in ("id", "error"):
        return column.fill_null("") if name == "id" else column
    if column.null_count == len(column):
        return pa.nulls(len(column), pa.int64() if name == "row" else pa.null())
    if pc.all(pc.starts_with(column, "[")).as_py():
        try:
            return _lists(name, column.to_pylist())
        except ValueError:  # text that only looks like JSON
            return column
    for of in (pa.int64(), pa.float64(), pa.bool_()):
        try:
            found = column.cast(of)
        except pa.ArrowInvalid:
            continue
        if found.cast(pa.string()).equals(column):  # "007" and "1e5" are text
            return found
    return column


def _lists(name: str, cells: list[str | None]) -> pa.Array:
    entries = [None if cell is None else np.array(_parsed(cell)) for cell in cells]
    full = next((entry for entry in entries if entry is not None and entry.size), None)
    if full is None:  # which type, and how wide, nobody can say
        blank: list[list[float] | None] = [None if entry is None else [] for entry in entries]
        return pa.array(blank, pa.list_(pa.null()))
    dtype = np.float32 if full.dtype == np.float64 else full.dtype
    ragged = any(cell is not None and cell.startswith("[ ") for cell in cells)
    none = np.zeros((0 if ragged else len(full), *full.shape[1:]), dtype)
    held = [none if entry is None or not entry.size else entry.astype(dtype) for entry in entries]
    of = Kind(pa.from_numpy_dtype(dtype), none.shape[1:] if ragged else none.shape, ragged)
    flat = Flat(
        np.concatenate(held) if ragged else np.stack(held),
        np.fromiter(map(len, held), np.int64, len(held)) if ragged else None,
        np.fromiter((entry is not None for entry in entries), bool, len(entries)),
    )
    return rebuild(pa.field(name, of.type()), of, flat)
