"""AIDO.Cell as a backbone: cells to a token for each gene of its list, and two for the depth."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor, nn

from mgen_core import Activations, BackboneCard, Inputs, MgenError, Row, RowError, Want

from .cell import Cell
from .listed import DEPTHS, LEAST_DEPTH, MOST, AlignedCell, Listed
from .network import CellNetwork
from .options import CellOptions


class CellBackbone(Listed):
    """An encoder of cells, with the weights and config of one model."""

    model_type = "cellfoundation"

    def __init__(self, card: BackboneCard, options: CellOptions) -> None:
        super().__init__(card, options)
        self.over = options.over
        self.length = self.listed + DEPTHS
        self.max_positions = self.length

    @cached_property
    def chosen(self) -> Tensor | None:
        """(S) bool: the tokens of `over`; None where they depend on the data.

        Raises `MgenError` for a gene that is not in the list.
        """
        if self.over == ("present",):
            return None
        mask = torch.zeros(self.length, dtype=torch.bool)
        if self.over == ("genes",):
            mask[:-DEPTHS] = True
            return mask
        for name in self.over:
            if name not in self.genes:
                hint = "`genes`, `present`, or names as they are in the model's gene list"
                raise MgenError(f"over={','.join(self.over)}: the model has no gene {name!r}", hint)
            mask[self.genes.index(name)] = True
        return mask

    @cached_property
    def token_names(self) -> Sequence[str]:  # type: ignore[override]
        """The genes of `over`, in the order of the list; none where they depend on the data."""
        if self.chosen is None:
            return ()
        return tuple(self.genes[place] for place in self.chosen.nonzero().flatten().tolist())

    # -- without weights -------------------------------------------------------------------

    def prepare(self, row: Row) -> Row:
        """Its counts in the order of the gene list. Raises `RowError` for none, or not counts."""
        if not isinstance(row.data, Cell):
            raise RowError("it is no cell of a count matrix")
        _ = self.chosen  # names that are wrong are told before anything is planned
        return row.with_data(self.align_seen(row.data))

    def measure(self, row: Row) -> int:
        return self.length

    def collate(self, rows: Sequence[Row]) -> Inputs:
        """`values` (B, S) float32 and `mask` (B, S) bool."""
        values = torch.stack([self._values(row.data) for row in rows])
        if self.as_reference:
            values = values.bfloat16().float()
        return {"values": values, "mask": torch.stack([self._mask(row.data) for row in rows])}

    def _values(self, cell: AlignedCell) -> Tensor:
        """(S) float32: ln(1 + counts in 10,000), then twice the depth, log10 of all counts."""
        counts = cell.dense(self.listed)
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
        self.ignored = self.unused()
        return CellNetwork(self.config, self.want.logits, self.length)

    def forward(self, module: nn.Module, inputs: Inputs, want: Want) -> Activations:
        values, mask = inputs["values"], inputs["mask"]
        positions = torch.arange(values.shape[1], device=values.device)
        hidden, logits = module(values, positions, want.layers, want.logits)
        return Activations(hidden, mask, logits, torch.ones_like(mask))
