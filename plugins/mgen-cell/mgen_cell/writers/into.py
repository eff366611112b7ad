"""Columns added to a copy of an AnnData file, beside all that is there.

- vectors are `obsm["X_BACKBONE"]` (`X_BACKBONE_REST`), NaN for a cell without one;
- texts and numbers are `obs["BACKBONE_NAME"]`;
- cells without a result are told in `obs["BACKBONE_error"]`, where there are any;
- `uns["mgen"]["BACKBONE"]` holds the metadata of the run.

What an earlier merge of the same backbone has left under these names is replaced.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO

import h5py  # type: ignore[import-untyped]
import numpy as np
import pyarrow as pa

from mgen_core import MgenError

from ..cell import Array
from ..readers.source import values
from .encoding import TEXT, add_array, add_categories, add_group
from .layout import FLOATS, Layout, layout_of, nan_of, tell, told

ROW, ID, ERROR = "row", "id", "error"
NOT_RUN = "not in the run"
START = "embedding"
ORDER = "column-order"


def add_into(
    source: Path, scratch: BinaryIO, tables: Iterable[pa.Table], schema: pa.Schema
) -> None:
    """Copy `source` to `scratch` and add the columns of the tables to that.

    Raises `MgenError` for a file of another kind, and for rows that are not cells of it.
    """
    backbone = told(schema).get("mgen.backbone", "mgen")
    columns = [
        make_added(layout_of(field), backbone) for field in schema if field.name not in (ROW, ID)
    ]
    with source.open("rb") as original:
        shutil.copyfileobj(original, scratch, 1 << 20)
    try:
        found = h5py.File(scratch, "r+")
    except OSError as error:
        what = f"{source} is no whole HDF5 file"
        raise MgenError(what, "--into takes an .h5ad file") from error
    with found:
        cells = Cells(found, source)
        for column in columns:
            column.open(found, cells.count)
        for table in tables:
            places = cells.places(table)
            for column in columns:
                column.add(found, places, table[column.layout.field.name])
        if not cells.taken.all():
            _error_of(columns, backbone, cells).tell_missing(~cells.taken)
        _forget(found["obs"], f"{backbone}_{ERROR}")  # this run may have none
        for column in columns:
            column.close(found)
        group, name = _place(found, f"uns/mgen/{backbone}")
        tell(add_group(group, name), schema)


class Cells:
    """The cells of a file, and which of them a row of the run is.

    That is the one in the row's place, if it has the row's id; else the only one of that name.
    """

    def __init__(self, found: h5py.File, source: Path) -> None:
        obs = found.get("obs")
        name = obs.attrs.get("_index") if isinstance(obs, h5py.Group) else None
        if name is None or not isinstance(obs.get(name), h5py.Dataset):
            raise MgenError(
                f"{source} has no table of cells", "read it with anndata and write it again"
            )
        self.source = source
        self.names = obs[name]
        self.count = len(self.names)
        self.taken = np.zeros(self.count, dtype=bool)

    def places(self, table: pa.Table) -> Array:
        """(rows) int64: the cell of each row. Raises `MgenError` where there is not just one."""
        ids = table[ID].to_pylist()
        places = np.array(table[ROW].to_pylist(), dtype=np.int64)
        if not len(places):
            return places
        first = int(places.min())
        here = values(self.names, slice(first, int(places.max()) + 1))
        for number, (place, name) in enumerate(zip((places - first).tolist(), ids)):
            if place >= len(here) or str(here[place]) != name:
                places[number] = self._named(name)
        for place, name in zip(places.tolist(), ids):
            if self.taken[place]:
                what = f"several rows of the run are the cell {name!r} of {self.source}"
                raise MgenError(what, "ids of the run must tell the cells apart")
            self.taken[place] = True
        return places

    def _named(self, name: str) -> int:
        place = self._numbers.get(name)
        if place is None:
            raise MgenError(
                f"{self.source} has no cell {name!r}, which is in the run",
                "give the file that the run was made from; ids of the run must be its obs names",
            )
        if place < 0:
            raise MgenError(
                f"{self.source} has several cells {name!r}, and not at their places in the run",
                "give the file that the run was made from, or make its obs names unique",
            )
        return place

    @cached_property
    def _numbers(self) -> dict[str, int]:
        """Name -> place; -1 where several have it."""
        found: dict[str, int] = {}
        for place, name in enumerate(map(str, values(self.names))):
            found[name] = -1 if name in found else place
        return found


class Added:
    """Vectors, written as they come."""

    def __init__(self, layout: Layout, place: str) -> None:
        self.layout = layout
        self.place = place

    def open(self, found: h5py.File, cells: int) -> None:
        """Make room."""
        group, name = _place(found, self.place)
        shape, kind = (cells, *self.layout.shape), nan_of(self.layout.leaf)
        self.node = add_array(group, name, shape=shape, dtype=kind, fillvalue=np.nan)

    def add(self, found: h5py.File, places: Array, column: pa.ChunkedArray) -> None:
        """Write the entries of the cells at `places`."""
        valid, numbers = self.layout.numbers(column)
        places = places[valid]
        for first, last in _runs(places):
            start = int(places[first])
            self.node[start : start + last - first] = numbers[first:last]

    def close(self, found: h5py.File) -> None:
        """What is left to do."""


class OfObs(Added):
    """A column of obs: numbers, held in memory until the end."""

    def open(self, found: h5py.File, cells: int) -> None:
        self.values = np.zeros(cells, dtype=self.layout.leaf.to_pandas_dtype())
        self.known = np.zeros(cells, dtype=bool)

    def add(self, found: h5py.File, places: Array, column: pa.ChunkedArray) -> None:
        valid, numbers = self.layout.numbers(column)
        self.values[places[valid]] = numbers
        self.known[places[valid]] = True

    def close(self, found: h5py.File) -> None:
        group, name = _place(found, self.place)
        if self.layout.leaf in FLOATS:
            add_array(group, name, data=np.where(self.known, self.values, np.nan))
        elif self.known.all():
            add_array(group, name, data=self.values)
        else:
            kind = "boolean" if self.values.dtype == bool else "integer"
            column = add_group(group, name, f"nullable-{kind}")
            add_array(column, "values", data=self.values)
            add_array(column, "mask", data=~self.known)
        _list_column(found["obs"], name)


class TextsOfObs(Added):
    """A column of texts, likewise."""

    def open(self, found: h5py.File, cells: int) -> None:
        self.codes = np.full(cells, -1, dtype=np.int32)
        self.texts: dict[str, int] = {}

    def add(self, found: h5py.File, places: Array, column: pa.ChunkedArray) -> None:
        for place, text in zip(places.tolist(), column.to_pylist()):
            if text is not None:
                self.codes[place] = self.texts.setdefault(text, len(self.texts))

    def tell_missing(self, cells: Array) -> None:
        """Say of these cells that the run has not computed them."""
        self.codes[cells] = self.texts.setdefault(NOT_RUN, len(self.texts))

    def close(self, found: h5py.File) -> None:
        group, name = _place(found, self.place)
        add_categories(group, name, self.codes, list(self.texts))
        _list_column(found["obs"], name)


def make_added(layout: Layout, backbone: str) -> Added:
    """How a column of the run is added."""
    name = layout.field.name
    if layout.shape:
        rest = name[len(START) :] if name.startswith(START) else f"_{name}"
        return Added(layout, f"obsm/X_{backbone}{rest}")
    kind = TextsOfObs if layout.text else OfObs
    return kind(layout, f"obs/{backbone}_{name}")


def _error_of(columns: list[Added], backbone: str, cells: Cells) -> TextsOfObs:
    """The column of reasons; a new one where no row was set aside."""
    made = make_added(layout_of(pa.field(ERROR, pa.string())), backbone)
    found = next((column for column in columns if column.place == made.place), made)
    assert isinstance(found, TextsOfObs)
    if found is made:
        found.codes, found.texts = np.full(cells.count, -1, dtype=np.int32), {}
        columns.append(found)
    return found


def _place(found: h5py.File, path: str) -> tuple[h5py.Group, str]:
    """The group that a path is in, made where there is none, and a name in it that is free."""
    group: h5py.Group = found
    *folders, name = path.split("/")
    for folder in folders:
        group = group[folder] if folder in group else add_group(group, folder)
        if not isinstance(group, h5py.Group):
            raise MgenError(f"{group.name} of the file is no mapping", "give it another name")
    if name in group:
        del group[name]
    return group, name


def _list_column(obs: h5py.Group, name: str) -> None:
    """AnnData reads the columns of a table that are listed."""
    order = [str(known) for known in obs.attrs.get(ORDER, ())]
    if name not in order:
        obs.attrs[ORDER] = np.array([*order, name], dtype=TEXT)


def _forget(obs: h5py.Group, name: str) -> None:
    """Remove a column."""
    if name in obs:
        del obs[name]
        order = [str(known) for known in obs.attrs.get(ORDER, ()) if str(known) != name]
        obs.attrs[ORDER] = np.array(order, dtype=TEXT)


def _runs(places: Array) -> Iterator[tuple[int, int]]:
    """Following entries whose places follow each other."""
    ends: Sequence[int] = (np.flatnonzero(np.diff(places) != 1) + 1).tolist()
    cuts = [0, *ends, len(places)]
    return ((first, last) for first, last in pairwise(cuts) if last > first)
