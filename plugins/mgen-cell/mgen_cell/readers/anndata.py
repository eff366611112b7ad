"""h5ad: a matrix of counts, or several, with tables of the cells and of the genes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import h5py  # type: ignore[import-untyped]
import numpy as np

from mgen_core import InputError, Reader, Rows

from ..cell import Cell, Genes, Neighbourhood
from ..options import AnnDataOptions
from .matrix import SOUND, Matrix, open_matrix
from .source import COUNTS, IDS, CountRows, inside, named, opened, readable, values

AT_ONCE = 64  # cells with their neighbours


class AnnDataReader(Reader):
    """Opens h5ad files. Columns: `X`, `raw/X`, `layers/NAME`, `obs_names`, the columns of obs."""

    options: AnnDataOptions

    def open(self, uri: str) -> Rows:
        path = readable(uri)
        with opened(path) as file:
            matrices = _matrices(file)
            if not matrices:
                raise InputError(f"{path} holds no X", SOUND)
            tables = {name: "raw/var" if name == "raw/X" else "var" for name in matrices}
            genes = {
                table: _genes(path, inside(file, table, path), self.options.gene_col)
                for table in set(tables.values())
            }
            obs = inside(file, "obs", path)
            columns = {name: f"obs/{name}" for name in _columns(obs) if name not in matrices}
            columns[IDS] = f"obs/{_index(path, obs)}"
            found = AnnDataRows(
                path,
                matrices,
                {name: genes[table] for name, table in tables.items()},
                columns,
                len(values(file[columns[IDS]])),
                self.options,
            )
            for name in matrices:
                found.open(file, name)
            return found


class AnnDataRows(CountRows):
    """The cells of an h5ad file; with `neighbours`, each with those around it."""

    options: AnnDataOptions

    def chunks(self, columns: Sequence[str]) -> Iterator[Mapping[str, Sequence[Any]]]:
        chunks = super().chunks(columns)
        yield from self._surrounded(chunks, columns) if self.options.neighbours else chunks

    def _surrounded(
        self, chunks: Iterator[Mapping[str, Sequence[Any]]], columns: Sequence[str]
    ) -> Iterator[Mapping[str, Sequence[Any]]]:
        from .around import by_number, nearest

        name = next(name for name in columns if name in self.matrices)
        genes = self.genes[name]
        with opened(self.path) as file:
            axes = [values(inside(file["obs"], axis, self.path)) for axis in self.options.xy]
            xy = np.array(axes, dtype=np.float64).T
            around = nearest(xy, self.options.neighbours)
            row = by_number(self.open(file, name))
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

    def open(self, file: h5py.File, matrix: str) -> Matrix:
        found = open_matrix(file[self.matrices[matrix]], f"{matrix} of {self.path}")
        genes = len(self.genes[matrix].names)
        if (found.rows, found.genes) != (self.length, genes):
            what = f"{matrix} is {found.rows:,} x {found.genes:,}, obs and var are "
            raise InputError(f"{self.path}: {what}{self.length:,} x {genes:,}", SOUND)
        return found


def _matrices(file: h5py.File) -> dict[str, str]:
    layers = file.get("layers")
    names = list(layers) if isinstance(layers, h5py.Group) else []
    wanted = [COUNTS, "raw/X", *(f"layers/{name}" for name in names)]
    return {name: name for name in wanted if file.get(name) is not None}


def _genes(path: Path, var: Any, column: str | None) -> Genes:
    """Names of the genes, by a column of var or its index. Raises `InputError`."""
    columns = _columns(var)
    if column is not None and column not in columns:
        listed = ", ".join(columns[:20]) or "none"
        raise InputError(
            f"{path} has no column {column!r} of genes", f"gene_col takes one of: {listed}"
        )
    return Genes(named(values(var[column or _index(path, var)])), columns)


def _columns(table: Any) -> list[str]:
    """Names of a table's columns, its index left out."""
    if not isinstance(table, h5py.Group):
        return []
    hidden = {str(table.attrs.get("_index", "")), "__categories"}
    return [name for name in table if name not in hidden]


def _index(path: Path, table: Any) -> str:
    name = str(table.attrs.get("_index", "")) if isinstance(table, h5py.Group) else ""
    if not name or table.get(name) is None:
        hint = "read it with anndata and write it again: it may be of a version before 0.7"
        raise InputError(f"{path}: a table of it has no index", hint)
    return name
