"""10x Genomics' HDF5 (`filtered_feature_bc_matrix.h5`): cells by columns of genes."""

from __future__ import annotations

from typing import Any

from mgen_core import InputError, Reader, Rows

from ..cell import Genes
from ..options import GeneOptions
from .matrix import Matrix, sparse
from .source import COUNTS, IDS, CountRows, inside, named, values
from .stores import HdfStore

EXPRESSION = "Gene Expression"


class TenXReader(Reader):
    """Opens files of Cell Ranger 3 and later. Columns: `X` and `obs_names`, the barcodes."""

    options: GeneOptions

    def open(self, uri: str) -> Rows:
        store = HdfStore(uri)
        with store.opened() as file:
            if "matrix" not in file:
                hint = "AnnData files end in .h5ad (or say --reader h5ad)"
                raise InputError(f"{uri} holds no matrix of Cell Ranger 3 or later", hint)
            genes = _genes(uri, inside(file["matrix"], "features", uri), self.options.gene_col)
            barcodes = values(inside(file["matrix"], "barcodes", uri))
            columns = {IDS: "matrix/barcodes"}
            found = TenXRows(store, {COUNTS: "matrix"}, {COUNTS: genes}, columns, len(barcodes))
            found.open(file, COUNTS)
            return found


class TenXRows(CountRows):
    """The cells of a 10x file."""

    def open(self, root: Any, matrix: str) -> Matrix:
        genes = len(self.genes[matrix].names)
        # 10x stores genes x cells by columns: our rows, end to end.
        return sparse(root["matrix"], "csr", self.length, genes, self.store.name)


def _genes(uri: str, features: Any, column: str | None) -> Genes:
    """Symbols, or another column. What is no gene has no name: a CD4 antibody is not CD4."""
    others = [name for name in features if not name.startswith("_")]
    names = named(values(inside(features, column or "name", uri)))
    if "feature_type" in features:
        kinds = values(features["feature_type"])
        names = [name if kind == EXPRESSION else "" for name, kind in zip(names, kinds)]
    return Genes(names, others)
