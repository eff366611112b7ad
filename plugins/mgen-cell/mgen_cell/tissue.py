"""AIDO.Tissue as a backbone: the genes seen in a cell, and in those around it, as one row.

What is computed for a row is what the reference computes for it in a batch of its own, in its
bfloat16 steps. `as_reference` brings back what a batch does to it there: totals over all rows, and
padding, which is attended to, up to the longest.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from mgen_core import Activations, BackboneCard, Inputs, Row, RowError, Want

from .cell import Array, Cell, Neighbourhood
from .config import TURNED
from .listed import DEPTHS, LEAST_DEPTH, MOST, Listed, noted
from .network import CellNetwork, Way
from .options import TissueOptions
from .rotary import turns

STEP = 16  # tokens of a row are padded to a multiple of it


class TissueBackbone(Listed):
    """An encoder of cells among their neighbours, with the weights and config of one model."""

    model_type = TURNED

    def __init__(self, card: BackboneCard, options: TissueOptions) -> None:
        super().__init__(card, options)
        self.use_xy = options.use_xy
        self.packed = not self.as_reference
        self.nowhere = self.listed + DEPTHS  # the place of padding

    # -- without weights -------------------------------------------------------------------

    def prepare(self, row: Row) -> Row:
        """Its cells in the order of the gene list. Raises `RowError` for an empty one in front."""
        data = row.data
        if isinstance(data, Neighbourhood):
            centre, *others = data.cells
            cells = (self.align_seen(centre), *map(self.align, others))
            return row.with_data((cells, self._xy(data.xy)))
        if not isinstance(data, Cell):
            raise RowError("it is no cell of a count matrix")
        if self.use_xy:
            raise RowError("use_xy needs a cell's place: give --option neighbours=N")
        return row.with_data(((self.align_seen(data),), None))

    def _xy(self, xy: Array) -> list[list[int]] | None:
        """Places as the position table takes them. Raises `RowError` for what it has not."""
        if not self.use_xy:
            return None
        if (xy != xy.round()).any() or xy.min() < 0 or xy[:, 0].max() > self.nowhere:
            raise RowError(f"a place is no whole number from 0 to {self.nowhere:,}")
        return [[int(x), int(y)] for x, y in xy]

    def note(self, row: Row, prepared: Row) -> str | None:
        return noted(prepared.data[0][0])

    def measure(self, row: Row) -> int:
        cells, _ = row.data
        return padded(sum(len(cell.places) + DEPTHS for cell in cells))

    def collate(self, rows: Sequence[Row]) -> Inputs:
        """`values` (1, T) and `places` (2, T) of rows end to end, each of `lengths` tokens.

        Of each, `own` come out, as `mask` (B, L) says: those of the cell itself.
        """
        dense = [[cell.dense(self.listed).bfloat16() for cell in row.data[0]] for row in rows]
        totals = [[cell.sum() for cell in cells] for cells in dense]
        if self.as_reference:  # of each slot, over all rows
            totals = [[torch.stack(slot).sum() for slot in zip(*dense, strict=True)]] * len(rows)
        found = [self._tokens(*each) for each in zip(rows, dense, totals)]
        lengths = [padded(values.shape[0]) for values, _, _ in found]
        own = [own for _, _, own in found]
        if self.as_reference:
            lengths = [max(lengths)] * len(rows)
            own = [m if len(cells) == 1 else n for m, n, cells in zip(lengths, own, dense)]
        every = [self._pad(*each) for each in zip(found, rows, lengths)]
        return {
            "values": torch.cat([values for values, _ in every]).unsqueeze(0),
            "places": torch.cat([places for _, places in every], dim=1),
            "mask": pad_sequence([torch.ones(n, dtype=torch.bool) for n in own], batch_first=True),
            "lengths": tuple(lengths),
            "own": tuple(own),
        }

    def _tokens(self, row: Row, dense: list[Tensor], totals: list[Tensor]) -> Tokens:
        """What is seen in a row's cells."""
        values = torch.stack([seen_in(*each) for each in zip(dense, totals)])  # (cells, S)
        seen = values > 0
        slots, genes = seen.nonzero(as_tuple=True)
        xy = row.data[1]
        places = torch.stack([genes, slots]) if xy is None else torch.tensor(xy)[slots].T
        return Tokens(values[seen], places, int(seen[0].sum()))

    def _pad(self, found: Tokens, row: Row, length: int) -> tuple[Tensor, Tensor]:
        cells, xy = row.data
        more = (0, length - found.values.shape[0])
        aside = (0, 0) if xy else (self.nowhere, 0 if len(cells) == 1 else self.nowhere)
        places = [pad(axis, more, value=place) for axis, place in zip(found.places, aside)]
        return pad(found.values, more, value=self.config.padding), torch.stack(places)

    # -- with weights ----------------------------------------------------------------------

    def build(self) -> nn.Module:
        self.ignored = self.unused()
        return CellNetwork(self.config, self.want.logits, self.nowhere + 1)

    def forward(self, module: nn.Module, inputs: Inputs, want: Want) -> Activations:
        values, places, mask = inputs["values"], inputs["places"], inputs["mask"]
        size = self.config.width // self.config.heads
        way = Way(turns(places, self.nowhere, size), inputs["lengths"])
        streams, numbers = module(values, places[0], want.layers, want.logits, way)

        def own(stream: Tensor) -> Tensor:
            rows = zip(torch.split(stream[0], list(inputs["lengths"])), inputs["own"])
            return pad_sequence([tokens[:count] for tokens, count in rows], batch_first=True)

        hidden = {number: own(stream) for number, stream in streams.items()}
        return Activations(hidden, mask, None if numbers is None else own(numbers), mask)


class Tokens(NamedTuple):
    """A row before padding: `values` (T) float32, `places` (2, T), how many its first cell has."""

    values: Tensor
    places: Tensor
    own: int


def padded(tokens: int) -> int:
    """As many as are computed for so many."""
    return -(-tokens // STEP) * STEP


def seen_in(counts: Tensor, total: Tensor) -> Tensor:
    """(S) float32: ln(1 + counts in 10,000), then twice the depth; in steps of bfloat16."""
    depth = total.log10().float().clamp(min=LEAST_DEPTH).expand(DEPTHS)
    return torch.cat([torch.log1p(counts / total * 10_000).float(), depth]).clamp(max=MOST)
