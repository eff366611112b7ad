"""h5ad: what was computed as AnnData has it, for scanpy and its kin."""

from __future__ import annotations

import base64
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from typing import BinaryIO

import h5py  # type: ignore[import-untyped]
import numpy as np
import pyarrow as pa

from mgen_core import RunError, Writer

from .encoding import TEXT, add_group, add_growing, add_text, add_texts, append, encode
from .into import add_into
from .layout import FLOATS, Layout, layout_of, tell, tokens_of

INDEX = "_index"
ID = "id"
SCHEMA = "schema"


class AnnDataWriter(Writer):
    """An AnnData file without X, or a copy of one with columns added; memory stays flat.

    - a column of vectors is `obsm["X_BACKBONE"]`, or `obsm["X_BACKBONE_REST"]` of `embedding_REST`;
    - one of a number for each of the tokens that `mgen.tokens` names is a layer, they are `var`;
    - texts (as categories) and numbers are columns of obs, `id` its index;
    - a vector that is null is NaN, and `uns["mgen"]["valid"]` tells;
    - `uns["mgen"]` holds the metadata of the run.

    In a copy obs and var are the user's: see `into`.
    """

    spools = True

    def write(self, file: BinaryIO, tables: Iterable[pa.Table], schema: pa.Schema) -> None:
        # HDF5 goes back and forth in its file, which the one that is given cannot.
        with tempfile.TemporaryFile(dir=self.scratch) as scratch:
            if self.source is None:
                columns = [make_column(field, schema) for field in schema]
                with h5py.File(scratch, "w") as found:
                    _fill(found, tables, schema, columns)
            else:
                add_into(self.source, scratch, tables, schema)
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

    def __init__(self, layout: Layout, place: str) -> None:
        self.layout = layout
        self.field, self.leaf, self.shape = layout
        self.place = place
        self.whole = True

    @property
    def valid(self) -> str:
        """Where it says which entries are not null."""
        return f"uns/mgen/valid/{self.field.name}"

    def open(self, found: h5py.File) -> None:
        """Make room for it."""
        fill = np.nan if self.leaf in FLOATS else None
        kind = self.leaf.to_pandas_dtype()
        add_growing(found, self.place, self.shape, kind, fillvalue=fill)
        add_growing(found, self.valid, (), bool)

    def add(self, found: h5py.File, first: int, column: pa.ChunkedArray) -> None:
        """Write the entries from `first` on."""
        valid, values = self.layout.numbers(column)
        append(found[self.valid], first, valid)
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

    def __init__(self, layout: Layout, place: str) -> None:
        super().__init__(layout, place)
        self.known: dict[str, int] = {}

    def open(self, found: h5py.File) -> None:
        group = add_group(found, self.place, "categorical", "0.2.0")
        group.attrs["ordered"] = False
        add_growing(found, f"{self.place}/codes", (), np.int32)

    def add(self, found: h5py.File, first: int, column: pa.ChunkedArray) -> None:
        texts = column.to_pylist()
        codes = [-1 if t is None else self.known.setdefault(t, len(self.known)) for t in texts]
        append(found[f"{self.place}/codes"], first, np.array(codes, dtype=np.int32))

    def close(self, found: h5py.File) -> None:
        add_texts(found, f"{self.place}/categories", list(self.known))

    def read(self, found: h5py.File) -> pa.Array:
        names = [*found[f"{self.place}/categories"].asstr()[:], None]
        return pa.array([names[code] for code in found[f"{self.place}/codes"][:]], self.field.type)


class Index(Column):
    """The ids: the index of obs."""

    def open(self, found: h5py.File) -> None:
        add_texts(found, self.place, [])

    def add(self, found: h5py.File, first: int, column: pa.ChunkedArray) -> None:
        append(found[self.place], first, np.array(column.to_pylist(), dtype=object))

    def close(self, found: h5py.File) -> None:
        pass

    def read(self, found: h5py.File) -> pa.Array:
        return pa.array(list(found[self.place].asstr()[:]), self.field.type)


def make_column(field: pa.Field, schema: pa.Schema) -> Column:
    """How a column lies in the file. Raises `MgenError` for one that AnnData cannot hold."""
    layout = layout_of(field)
    if field.name == ID:
        return Index(layout, f"obs/{INDEX}")
    if layout.text:
        return Texts(layout, f"obs/{field.name}")
    if layout.shape == (len(tokens_of(schema)),):
        return Column(layout, f"layers/{field.name}")
    place = f"obsm/{_key(field.name, schema)}" if layout.shape else f"obs/{field.name}"
    return Column(layout, place)


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
    encode(found, "anndata", "0.1.0")
    for name in ("obsm", "varm", "obsp", "varp", "layers", "uns", "uns/mgen", "uns/mgen/valid"):
        add_group(found, name)
    for name in ("obs", "var"):
        table = add_group(found, name, "dataframe", "0.2.0")
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
    layers = any(column.place.startswith("layers/") for column in columns)
    add_texts(found, f"var/{INDEX}", tokens_of(schema) if layers else [])
    if ID not in schema.names:
        add_texts(found, f"obs/{INDEX}", [str(row) for row in range(rows)])
    tell(found["uns/mgen"], schema)
    stored = base64.b64encode(schema.serialize().to_pybytes()).decode()
    add_text(found["uns/mgen"], SCHEMA, stored)
