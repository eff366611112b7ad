"""AnnData: a matrix of counts, or several, with tables of the cells and of the genes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from mgen_core import InputError, Reader, Rows

from ..cell import Cell, Genes, Neighbourhood
from ..options import AnnDataOptions
from .matrix import SOUND, Matrix, open_matrix
from .source import COUNTS, IDS, CountRows, inside, named, values
from .stores import is_array, open_store

AT_ONCE = 64  # cells with their neighbours


class AnnDataReader(Reader):
    """Opens .h5ad files, folders of zarr, and objects.

    Columns: `X`, `raw/X`, `layers/NAME`, `obs_names`, the columns of obs.
    """

    options: AnnDataOptions

    def open(self, uri: Any) -> Rows:
        store = open_store(uri)
        where = store.name
        with store.opened() as root:
            matrices = _matrices(root)
            if not matrices:
                raise InputError(f"{where} holds no X", SOUND)
            tables = {name: "raw/var" if name == "raw/X" else "var" for name in matrices}
            genes = {
                table: _genes(where, inside(root, table, where), self.options.gene_col)
                for table in set(tables.values())
            }
            obs = inside(root, "obs", where)
            columns = {name: f"obs/{name}" for name in _columns(obs) if name not in matrices}
            columns[IDS] = f"obs/{_index(where, obs)}"
            found = AnnDataRows(
                store,
                matrices,
                {name: genes[table] for name, table in tables.items()},
                columns,
                len(values(root[columns[IDS]])),
            )
            found.around = self.options
            for name in matrices:
                found.open(root, name)
            return found


class AnnDataRows(CountRows):
    """The cells of an h5ad file; with `neighbours`, each with those around it."""

    around = AnnDataOptions()

    def chunks(self, columns: Sequence[str]) -> Iterator[Mapping[str, Sequence[Any]]]:
        chunks = super().chunks(columns)
        yield from self._surrounded(chunks, columns) if self.around.neighbours else chunks

    def _surrounded(
        self, chunks: Iterator[Mapping[str, Sequence[Any]]], columns: Sequence[str]
    ) -> Iterator[Mapping[str, Sequence[Any]]]:
        from .around import by_number, nearest

        name = next(name for name in columns if name in self.matrices)
        genes = self.genes[name]
        with self.store.opened() as root:
            obs, where = root["obs"], self.store.name
            axes = [values(inside(obs, axis, where)) for axis in self.around.xy]
            xy = np.array(axes, dtype=np.float64).T
            around = nearest(xy, self.around.neighbours)
            row = by_number(self.open(root, name))
            first = 0
            for chunk in chunks:
                for start in range(0, len(chunk[name]), AT_ONCE):
                    some = {key: column[start : start + AT_ONCE] for key, column in chunk.items()}
                    cells: list[Neighbourhood] = []
                    for cell in some[name]:
                        near = around[first + len(cells)]
                        others = (Cell(genes, *row(int(other))) for other in near)
                        places = xy[[first + len(cells), *near]]
                        cells.append(Neighbourhood((cell, *others), places))
                    first += len(cells)
                    yield {**some, name: cells}

    def open(self, root: Any, matrix: str) -> Matrix:
        where = self.store.name
        found = open_matrix(root[self.matrices[matrix]], f"{matrix} of {where}")
        genes = len(self.genes[matrix].names)
        if (found.rows, found.genes) != (self.length, genes):
            what = f"{matrix} is {found.rows:,} x {found.genes:,}, obs and var are "
            raise InputError(f"{where}: {what}{self.length:,} x {genes:,}", SOUND)
        return found


def _matrices(root: Any) -> dict[str, str]:
    layers = root.get("layers")
    names = [] if layers is None or is_array(layers) else list(layers)
    wanted = [COUNTS, "raw/X", *(f"layers/{name}" for name in names)]
    return {name: name for name in wanted if root.get(name) is not None}


def _genes(where: str, var: Any, column: str | None) -> Genes:
    """Names of the genes, by a column of var or its index. Raises `InputError`."""
    columns = _columns(var)
    if column is not None and column not in columns:
        listed = ", ".join(columns[:20]) or "none"
        raise InputError(
            f"{where} has no column {column!r} of genes", f"gene_col takes one of: {listed}"
        )
    return Genes(named(values(var[column or _index(where, var)])), columns)


def _columns(table: Any) -> list[str]:
    """Names of a table's columns, its index left out."""
    if is_array(table):
        return []
    hidden = {str(table.attrs.get("_index", "")), "__categories"}
    return sorted(name for name in table if name not in hidden)


def _index(where: str, table: Any) -> str:
    name = "" if is_array(table) else str(table.attrs.get("_index", ""))
    if not name or table.get(name) is None:
        hint = "read it with anndata and write it again: it may be of a version before 0.7"
        raise InputError(f"{where}: a table of it has no index", hint)
    return name
