"""AIDO.Cell as a backbone: cells to a token for each gene of its list, and two for the depth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from mgen_core import (
    Activations,
    Backbone,
    BackboneCard,
    Inputs,
    MgenError,
    Row,
    RowError,
    Want,
)

from .cell import Array, Cell, Genes
from .config import Config, parse
from .genes import Aligned, find_list, read_list
from .geometry import GEOMETRY
from .names import ALL_OF_HEAD, COPY, published
from .network import CellNetwork
from .options import CellOptions

DEPTHS = 2
LEAST_DEPTH = 5.0  # log10 of the counts that a cell is taken to have at least
MOST = 20.0
NOT_WHOLE = "counts that are no whole numbers: the model was made for raw ones"


class AlignedCell(NamedTuple):
    """A prepared row's data: `counts[i]` (float32) is of gene `places[i]` of the model's list."""

    aligned: Aligned
    places: Array
    counts: Array


class CellBackbone(Backbone):
    """An encoder of cells, with the weights and config of one model."""

    units = ("Block",)
    vocabulary = ("expression",)  # ln(1 + counts in 10,000), one number a gene

    def __init__(self, card: BackboneCard, options: CellOptions) -> None:
        super().__init__(card, options)
        self.over = options.over
        self.as_reference = options.as_reference
        self.list = options.genes
        self.config = self._config()
        self.depth = self.config.depth
        self.tokens = self.config.genes + DEPTHS
        self.max_positions = self.tokens
        self._aligned: dict[Genes, Aligned] = {}

    def _config(self) -> Config:
        if self.options.weights is not None:
            return parse(self.options.config(), "cellfoundation")
        return parse(GEOMETRY[self.card.name], "cellfoundation")

    @property
    def width(self) -> int:
        return self.config.width

    @cached_property
    def genes(self) -> tuple[str, ...]:
        """The model's gene list. Raises `WeightsError`."""
        return read_list(find_list(self.list, self.options.weights), self.config.genes)

    @cached_property
    def chosen(self) -> Tensor | None:
        """(S) bool: the tokens of `over`; None where they depend on the data.

        Raises `MgenError` for a gene that is not in the list.
        """
        if self.over == ("present",):
            return None
        mask = torch.zeros(self.tokens, dtype=torch.bool)
        if self.over == ("genes",):
            mask[:-DEPTHS] = True
            return mask
        for name in self.over:
            if name not in self.genes:
                hint = "`genes`, `present`, or names as they are in the model's gene list"
                raise MgenError(f"over={','.join(self.over)}: the model has no gene {name!r}", hint)
            mask[self.genes.index(name)] = True
        return mask

    # -- without weights -------------------------------------------------------------------

    def prepare(self, row: Row) -> Row:
        """Its counts in the order of the gene list. Raises `RowError` for none, or not counts."""
        if not isinstance(row.data, Cell):
            raise RowError("it is no cell of a count matrix")
        aligned = self._align(row.data.genes)
        places, counts = aligned.counts(row.data)
        if not np.isfinite(counts).all():
            raise RowError("a count is NaN or infinite")
        if (counts < 0).any():
            raise RowError("a count is negative: the model takes raw counts")
        if not counts.any():
            raise RowError("no counts of genes that the model knows")
        return row.with_data(AlignedCell(aligned, places, counts))

    def note(self, row: Row, prepared: Row) -> str | None:
        aligned, _, counts = prepared.data
        fractions = NOT_WHOLE if (counts != np.rint(counts)).any() else None
        return "; ".join(filter(None, (aligned.note, fractions))) or None

    def _align(self, genes: Genes) -> Aligned:
        if genes not in self._aligned:
            _ = self.chosen  # names that are wrong are told before anything is planned
            self._aligned[genes] = Aligned(genes, self.genes)
        return self._aligned[genes]

    def measure(self, row: Row) -> int:
        return self.tokens

    def truncate(self, row: Row, tokens: int) -> Row:
        raise MgenError(
            f"a cell is {self.tokens:,} tokens and cannot be cut", "leave out --max-length"
        )

    def collate(self, rows: Sequence[Row]) -> Inputs:
        """`values` (B, S) float32 and `mask` (B, S) bool."""
        values = torch.stack([self._values(row.data) for row in rows])
        if self.as_reference:
            values = values.bfloat16().float()
        return {"values": values, "mask": torch.stack([self._mask(row.data) for row in rows])}

    def _values(self, cell: AlignedCell) -> Tensor:
        """(S) float32: ln(1 + counts in 10,000), then twice the depth, log10 of all counts."""
        summed = np.bincount(cell.places, weights=cell.counts, minlength=self.config.genes)
        counts = torch.from_numpy(summed.astype(np.float32))
        total = counts.sum()
        depth = total.log10().clamp(min=LEAST_DEPTH).expand(DEPTHS)
        return torch.cat([torch.log1p(counts / total * 10_000), depth]).clamp(max=MOST)

    def _mask(self, cell: AlignedCell) -> Tensor:
        if self.chosen is not None:
            return self.chosen
        present = torch.from_numpy(cell.aligned.present)
        return torch.cat([present, torch.ones(DEPTHS, dtype=torch.bool)])

    # -- with weights ----------------------------------------------------------------------

    def build(self) -> nn.Module:
        self.ignored = (COPY,) if self.want.logits else (ALL_OF_HEAD,)
        return CellNetwork(self.config, self.want.logits)

    def sources(self, name: str, keys: Mapping[str, Any]) -> Sequence[str]:
        return published(name, keys)

    def forward(self, module: nn.Module, inputs: Inputs, want: Want) -> Activations:
        values, mask = inputs["values"], inputs["mask"]
        positions = torch.arange(values.shape[1], device=values.device)
        hidden, logits = module(values, positions, want.layers, want.logits)
        return Activations(hidden, mask, logits, torch.ones_like(mask))
