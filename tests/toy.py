"""A backbone small enough for tests of everything around it, and the catalog that has it.

Vectors are exact in float32 whatever the batch: a row's vector tells its letters, so that a
test can say what must come out.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

from mgen_core import (
    Activations,
    Backbone,
    BackboneCard,
    BackboneOptions,
    Row,
    RowError,
    hookimpl,
)
from mgen_core.catalog import Catalog, discover

WIDTH = 4


class Toy(Backbone):
    """Layer 1 of a letter: its code, its position, 1, 0. `!` is illegal, `~` gives NaN."""

    depth = 1
    cls_position = 0

    def prepare(self, row: Row) -> Row:
        if not row.data:
            raise RowError("empty sequence")
        if "!" in row.data:
            raise RowError(f"illegal character '!' at position {row.data.index('!') + 1}")
        return row

    def measure(self, row: Row) -> int:
        return len(row.data) + 1

    def collate(self, rows):
        codes = [torch.tensor([0, *map(ord, row.data)]) for row in rows]
        return {"codes": torch.nn.utils.rnn.pad_sequence(codes, batch_first=True)}

    def build(self):
        return torch.nn.Module()

    def forward(self, module, inputs, want):
        codes = inputs["codes"]
        position = torch.arange(codes.shape[1]).expand_as(codes)
        one = torch.ones_like(codes)
        hidden = torch.stack([codes, position, one, one * 0], dim=-1).float()
        hidden[codes == ord("~")] = float("nan")
        mask = codes > 0
        return Activations({0: hidden * 2, 1: hidden}, mask)


CARD = BackboneCard(
    "toy",
    "A model for tests",
    "protein",
    load=Toy,
    width=WIDTH,
    max_tokens=101,
    licence="Apache-2.0",
    options=BackboneOptions,
)


class Plugin:
    @hookimpl
    def mgen_backbones(self):
        return [CARD]


def catalog() -> Catalog:
    """The installed plugins and the toy."""
    return Catalog((*discover().plugins, *Catalog.of(Plugin()).plugins))


def mean_of(text: str) -> list[float]:
    """What `embed --pool mean` gives for a sequence."""
    n = len(text)
    return [sum(map(ord, text)) / n, (n + 1) / 2, 1.0, 0.0]


def write_csv(path: Path, sequences: list[str]) -> Path:
    """A table id,sequence; ids repeat on purpose."""
    lines = [f"s{number % 7},{text}" for number, text in enumerate(sequences)]
    path.write_text("\n".join(["id,sequence", *lines]) + "\n")
    return path


def done_lines(run: Path) -> list[dict]:
    """The lines of the done-log of rank 0."""
    return [json.loads(line) for line in (run / "done/rank-00000.jsonl").read_text().splitlines()]
