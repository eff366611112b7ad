"""h5ad: a matrix of counts, or several, with tables of the cells and of the genes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py  # type: ignore[import-untyped]

from mgen_core import InputError, Reader, Rows

from ..cell import Genes
from ..options import GeneOptions
from .matrix import SOUND, Matrix, open_matrix
from .source import COUNTS, IDS, CountRows, inside, named, opened, readable, values


class AnnDataReader(Reader):
    """Opens h5ad files. Columns: `X`, `raw/X`, `layers/NAME`, `obs_names`, the columns of obs."""

    options: GeneOptions

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
            )
            for name in matrices:
                found.open(file, name)
            return found


class AnnDataRows(CountRows):
    """The cells of an h5ad file."""

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
