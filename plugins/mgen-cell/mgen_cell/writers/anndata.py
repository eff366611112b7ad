"""h5ad: what was computed as AnnData has it, for scanpy and its kin."""

from __future__ import annotations

import base64
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import h5py  # type: ignore[import-untyped]
import numpy as np
import pyarrow as pa

from mgen_core import MgenError, RunError, Writer

from ..cell import Array

ROWS = 1024  # of a chunk
INDEX = "_index"
ID, ROW = "id", "row"
SCHEMA = "schema"
TEXT = h5py.string_dtype()


class AnnDataWriter(Writer):
    """An AnnData file without X; memory stays flat.

    - a column of vectors is `obsm["X_BACKBONE"]`, or `obsm["X_BACKBONE_REST"]` of `embedding_REST`;
    - texts (as categories) and numbers are columns of obs, `id` its index;
    - a vector that is null is NaN, and `uns["mgen"]["valid"]` tells;
    - `uns["mgen"]` holds the metadata of the run.
    """

    spools = True
    scratch: Path | None = None

    def write(self, file: BinaryIO, tables: Iterable[pa.Table], schema: pa.Schema) -> None:
        columns = [make_column(field, schema) for field in schema]
        # HDF5 goes back and forth in its file, which the one that is given cannot.
        with tempfile.TemporaryFile(dir=self.scratch) as scratch:
            with h5py.File(scratch, "w") as found:
                _fill(found, tables, schema, columns)
            scratch.seek(0)
            shutil.copyfileobj(scratch, file, 1 << 20)

    def read(self, file: BinaryIO, columns: Sequence[str] | None = None) -> pa.Table:
        try:
            with h5py.File(file, "r") as found:
                return _read(found, columns)
        except (OSError, RuntimeError, LookupError, ValueError, TypeError) as error:
            what = f"no h5ad file of mgen's, or a damaged one: {error}"
            raise RunError(what, "compute it again") from error


def _read(found: h5py.File, columns: Sequence[str] | None) -> pa.Table:
    stored = base64.b64decode(found["uns/mgen"][SCHEMA][()])
    schema = pa.ipc.read_schema(pa.py_buffer(stored))
    fields = [field for field in schema if columns is None or field.name in columns]
    held = [make_column(field, schema).read(found) for field in fields]
    return pa.table(held, schema=pa.schema(fields, schema.metadata))


class Column:
    """A column on its way into the file, and out of it: numbers, or vectors of them."""

    def __init__(
        self, field: pa.Field, place: str, leaf: pa.DataType, shape: tuple[int, ...]
    ) -> None:
        self.field = field
        self.place = place
        self.leaf = leaf
        self.shape = shape
        self.whole = True

    @property
    def valid(self) -> str:
        """Where it says which entries are not null."""
        return f"uns/mgen/valid/{self.field.name}"

    def open(self, found: h5py.File) -> None:
        """Make room for it."""
        fill = np.nan if self.leaf in FLOATS else None
        kind = self.leaf.to_pandas_dtype()
        _array(found, self.place, (0, *self.shape), kind, fillvalue=fill)
        _array(found, self.valid, (0,), bool)

    def add(self, found: h5py.File, first: int, column: pa.ChunkedArray) -> None:
        """Write the entries from `first` on."""
        valid = np.asarray(column.is_valid())
        known = column.drop_null()
        for _ in self.shape:
            known = pa.chunked_array([c.flatten() for c in known.chunks], known.type.value_type)
        values = known.to_numpy().reshape(-1, *self.shape)
        _append(found[self.valid], first, valid)
        found[self.place].resize(first + len(valid), axis=0)
        self.whole = self.whole and bool(valid.all())
        if valid.all():
            found[self.place][first:] = values
        elif valid.any():
            found[self.place][first + np.flatnonzero(valid)] = values

    def close(self, found: h5py.File) -> None:
        """Tell nothing of nulls where there are none."""
        if self.whole:
            del found[self.valid]

    def read(self, found: h5py.File) -> pa.Array:
        """The column as it was."""
        values = found[self.place][:]
        valid = found[self.valid][:] if self.valid in found else np.ones(len(values), bool)
        array = pa.array(values[valid].reshape(-1), self.leaf)
        for size in reversed(self.shape):
            array = pa.FixedSizeListArray.from_arrays(array, size)
        places = np.where(valid, np.cumsum(valid) - 1, 0)
        return array.take(pa.array(places, mask=~valid)).cast(self.field.type)


class Texts(Column):
    """A column of texts, as categories."""

    def __init__(self, field: pa.Field, place: str) -> None:
        super().__init__(field, place, pa.string(), ())
        self.known: dict[str, int] = {}

    def open(self, found: h5py.File) -> None:
        group = _group(found, self.place, "categorical", "0.2.0")
        group.attrs["ordered"] = False
        _array(found, f"{self.place}/codes", (0,), np.int32)

    def add(self, found: h5py.File, first: int, column: pa.ChunkedArray) -> None:
        texts = column.to_pylist()
        codes = [-1 if t is None else self.known.setdefault(t, len(self.known)) for t in texts]
        _append(found[f"{self.place}/codes"], first, np.array(codes, dtype=np.int32))

    def close(self, found: h5py.File) -> None:
        _texts(found, f"{self.place}/categories", list(self.known))

    def read(self, found: h5py.File) -> pa.Array:
        names = [*found[f"{self.place}/categories"].asstr()[:], None]
        return pa.array([names[code] for code in found[f"{self.place}/codes"][:]], self.field.type)


class Index(Column):
    """The ids: the index of obs."""

    def open(self, found: h5py.File) -> None:
        _texts(found, self.place, [])

    def add(self, found: h5py.File, first: int, column: pa.ChunkedArray) -> None:
        _append(found[self.place], first, np.array(column.to_pylist(), dtype=object))

    def close(self, found: h5py.File) -> None:
        pass

    def read(self, found: h5py.File) -> pa.Array:
        return pa.array(list(found[self.place].asstr()[:]), self.field.type)


FLOATS = (pa.float16(), pa.float32(), pa.float64())


def make_column(field: pa.Field, schema: pa.Schema) -> Column:
    """How a column lies in the file. Raises `MgenError` for one that AnnData cannot hold."""
    leaf, shape = field.type, []
    while pa.types.is_fixed_size_list(leaf):
        shape.append(leaf.list_size)
        leaf = leaf.value_type
    if field.name == ID:
        return Index(field, f"obs/{INDEX}", leaf, ())
    if not shape and (pa.types.is_string(leaf) or pa.types.is_null(leaf)):
        return Texts(field, f"obs/{field.name}")
    marked = (field.metadata or {}).get(b"mgen.dtype")
    if marked or not (leaf in FLOATS or pa.types.is_integer(leaf)):
        raise MgenError(
            f"h5ad cannot hold the column {field.name!r} of type {field.type}",
            "choose others with --columns, or merge to .parquet",
        )
    place = f"obsm/{_key(field.name, schema)}" if shape else f"obs/{field.name}"
    return Column(field, place, leaf, tuple(shape))


def _key(name: str, schema: pa.Schema) -> str:
    """The name of vectors: that of the backbone, where the file tells, in place of `embedding`."""
    backbone = (schema.metadata or {}).get(b"mgen.backbone")
    start = "embedding"
    if backbone is None or not name.startswith(start):
        return f"X_{name}"
    return f"X_{backbone.decode()}{name[len(start) :]}"


def _fill(
    found: h5py.File, tables: Iterable[pa.Table], schema: pa.Schema, columns: list[Column]
) -> None:
    _encode(found, "anndata", "0.1.0")
    for name in ("obsm", "varm", "obsp", "varp", "layers", "uns", "uns/mgen", "uns/mgen/valid"):
        _group(found, name, "dict", "0.1.0")
    for name in ("obs", "var"):
        table = _group(found, name, "dataframe", "0.2.0")
        table.attrs["_index"] = INDEX
        table.attrs["column-order"] = np.array([], dtype=TEXT)
    of_obs = [c.field.name for c in columns if c.place.startswith("obs/") and c.field.name != ID]
    if of_obs:
        found["obs"].attrs["column-order"] = np.array(of_obs, dtype=TEXT)
    for column in columns:
        column.open(found)
    rows = 0
    for table in tables:
        for column in columns:
            column.add(found, rows, table[column.field.name])
        rows += table.num_rows
    for column in columns:
        column.close(found)
    _texts(found, f"var/{INDEX}", [])
    if ID not in schema.names:
        _texts(found, f"obs/{INDEX}", [str(row) for row in range(rows)])
    told = {key.decode(): value.decode() for key, value in (schema.metadata or {}).items()}
    stored = base64.b64encode(schema.serialize().to_pybytes()).decode()
    for key, text in {**told, SCHEMA: stored}.items():
        node = found["uns/mgen"].create_dataset(key.removeprefix("mgen."), data=text, dtype=TEXT)
        _encode(node, "string", "0.2.0")


def _encode(node: Any, kind: str, version: str) -> None:
    node.attrs["encoding-type"] = kind
    node.attrs["encoding-version"] = version


def _group(found: h5py.File, name: str, kind: str, version: str) -> Any:
    group = found.create_group(name)
    _encode(group, kind, version)
    return group


def _array(found: h5py.File, name: str, shape: tuple[int, ...], kind: Any, **more: Any) -> None:
    chunk = (ROWS, *shape[1:])
    rows = (None, *shape[1:])
    _encode(
        found.create_dataset(name, shape, kind, maxshape=rows, chunks=chunk, **more),
        "array",
        "0.2.0",
    )


def _texts(found: h5py.File, name: str, texts: list[str]) -> None:
    node = found.create_dataset(name, (len(texts),), TEXT, maxshape=(None,), chunks=(ROWS,))
    if texts:
        node[:] = texts
    _encode(node, "string-array", "0.2.0")


def _append(node: Any, first: int, values: Array) -> None:
    node.resize(first + len(values), axis=0)
    node[first:] = values
