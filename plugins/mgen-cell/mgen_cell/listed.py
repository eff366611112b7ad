"""What the models of the gene list share: cells in its order, published names, the config."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mgen_core import Backbone, BackboneCard, MgenError, Row, RowError, WeightsError

from .cell import Array, Cell, Genes
from .config import Config, parse
from .genes import Aligned, find_list, read_list
from .geometry import GENES, GEOMETRY
from .names import ALL_OF_HEAD, COPY, TABLES, published
from .options import ListOptions

DEPTHS = 2
LEAST_DEPTH = 5.0  # log10 of the counts that a cell is taken to have at least
MOST = 20.0
NOT_WHOLE = "counts that are no whole numbers: the model was made for raw ones"


class AlignedCell(NamedTuple):
    """A cell in the model's genes: `counts[i]` (float32) is of gene `places[i]` of the list."""

    aligned: Aligned
    places: Array
    counts: Array

    def dense(self, genes: int) -> Tensor:
        """(genes) float32: the counts of all genes of the list."""
        summed = np.bincount(self.places, weights=self.counts, minlength=genes)
        return torch.from_numpy(summed.astype(np.float32))


class Listed(Backbone):
    """A model whose input are the counts of a fixed list of genes."""

    units = ("Block",)
    vocabulary = ("expression",)  # ln(1 + counts in 10,000), one number a gene
    model_type = ""

    def __init__(self, card: BackboneCard, options: ListOptions) -> None:
        super().__init__(card, options)
        self.as_reference = options.as_reference
        self.list = options.genes
        self._aligned: dict[Genes, Aligned] = {}
        known = options.weights is not None or card.name in GEOMETRY
        self.depth = self.config.depth if known else None
        self.listed = self.config.genes if known else GENES

    @cached_property
    def config(self) -> Config:
        """From the weights, else as published. Raises `WeightsError` where neither tells."""
        if self.options.weights is not None:
            return parse(self.options.config(), self.model_type)
        if self.card.name in GEOMETRY:
            return parse(GEOMETRY[self.card.name], self.model_type)
        what = f"the sizes of {self.card.name} are in the config.json of its weights"
        raise WeightsError(what, "give --weights FOLDER")

    @property
    def width(self) -> int:
        known = self.depth is not None or self.card.width is None
        return self.config.width if known else super().width

    @cached_property
    def genes(self) -> tuple[str, ...]:
        """The model's gene list. Raises `WeightsError`."""
        return read_list(find_list(self.list, self.options.weights), self.listed)

    def align(self, cell: Cell) -> AlignedCell:
        """Its counts in the order of the list. Raises `RowError` for what is no count."""
        if cell.genes not in self._aligned:
            self._aligned[cell.genes] = Aligned(cell.genes, self.genes)
        aligned = self._aligned[cell.genes]
        places, counts = aligned.counts(cell)
        if not np.isfinite(counts).all():
            raise RowError("a count is NaN or infinite")
        if (counts < 0).any():
            raise RowError("a count is negative: the model takes raw counts")
        return AlignedCell(aligned, places, counts)

    def align_seen(self, cell: Cell) -> AlignedCell:
        """The same. Raises `RowError` for a cell without counts as well."""
        found = self.align(cell)
        if not found.counts.any():
            raise RowError("no counts of genes that the model knows")
        return found

    def note(self, row: Row, prepared: Row) -> str | None:
        return noted(prepared.data)

    def truncate(self, row: Row, tokens: int) -> Row:
        raise MgenError(
            f"a cell of {self.measure(row):,} tokens cannot be cut", "leave out --max-length"
        )

    def sources(self, name: str, keys: Mapping[str, Any]) -> Sequence[str]:
        return published(name, keys)

    def unused(self) -> tuple[str, ...]:
        """The checkpoint's keys that what is wanted does not need."""
        return (TABLES, COPY if self.want.logits else ALL_OF_HEAD)


def noted(cell: AlignedCell) -> str | None:
    """What of a cell's file does not fit the model, in words."""
    fractions = NOT_WHOLE if (cell.counts != np.rint(cell.counts)).any() else None
    return "; ".join(filter(None, (cell.aligned.note, fractions))) or None
