"""What the backbone makes of cells, with small random models."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mgen_cell.cell import Cell, Genes, Neighbourhood
from mgen_cell.genes import Aligned
from mgen_cell.plugin import CARDS

from mgen_core import InputError, MgenError, Row, RowError, WeightsError
from mgen_core.testing import check_backbone

CARD = CARDS[0]
NAMES = [f"GENE{number}" for number in range(30)]  # of the model in conftest


def row_of(genes: Genes, *counts: float, index: int = 0) -> Row:
    return Row(index, f"cell-{index}", Cell(genes, np.arange(len(counts)), np.array(counts)))


@pytest.fixture
def backbone(weights: Path) -> Any:
    return CARD.load(CARD, CARD.options(weights=weights))


def test_contract(weights: Path) -> None:
    genes = Genes(NAMES)
    draw = np.random.default_rng(0)
    rows = [row_of(genes, *draw.poisson(1.0, len(NAMES)), index=n) for n in range(4)]
    check_backbone("aido_cell_3m", weights=weights, rows=rows)


@pytest.mark.parametrize("around", [0, 2])
def test_contract_of_tissue(tissue_weights: Path, around: int) -> None:
    genes = Genes(NAMES)
    draw = np.random.default_rng(0)
    rows = []
    for number in range(4):
        counts = [draw.poisson(0.3 * number + 0.3, len(NAMES)) for _ in range(around + 1)]
        cells = tuple(Cell(genes, np.arange(len(NAMES)), one) for one in counts)
        data = Neighbourhood(cells, np.zeros((len(cells), 2))) if around else cells[0]
        rows.append(Row(number, f"cell-{number}", data))
    check_backbone("aido_tissue_3m", weights=tissue_weights, rows=rows)


def test_places_that_the_position_table_lacks_are_set_aside(tissue_weights: Path) -> None:
    card = next(card for card in CARDS if card.name == "aido_tissue_3m")
    backbone = card.load(card, card.options(weights=tissue_weights, use_xy=True))
    cell = row_of(Genes(NAMES), 1).data
    for x in (0.5, -1, 33):
        with pytest.raises(RowError, match="no whole number from 0 to 32"):
            backbone.prepare(Row(0, "", Neighbourhood((cell,), np.array([[x, 0]]))))
    with pytest.raises(RowError, match="neighbours=N"):
        backbone.prepare(Row(0, "", cell))


@settings(max_examples=20, deadline=None)
@given(st.randoms())
def test_the_order_of_the_genes_and_unknown_ones_change_nothing(draw: random.Random) -> None:
    names = [*NAMES, "X1", "X2"]
    counts = {name: draw.randrange(9) for name in names}
    aligned = []
    for _ in range(2):
        draw.shuffle(names)
        genes = Genes(tuple(names))
        numbers = np.array([float(counts[name]) for name in names])
        places, found = Aligned(genes, NAMES).counts(Cell(genes, np.arange(len(names)), numbers))
        aligned.append(np.bincount(places, found, len(NAMES)).tolist())
    assert aligned[0] == aligned[1] == [counts[name] for name in NAMES]


@pytest.mark.parametrize(
    ("counts", "reason"),
    [
        ([0, 0, 5], "no counts of genes that the model knows"),
        ([3, -1, 0], "negative"),
        ([3, float("nan"), 0], "NaN"),
        ([3, float("inf"), 0], "infinite"),
    ],
)
def test_cells_that_cannot_be_computed_are_set_aside(
    backbone: Any, counts: list[float], reason: str
) -> None:
    with pytest.raises(RowError, match=reason):
        backbone.prepare(row_of(Genes([*NAMES[:2], "unknown"]), *counts))


def test_a_row_that_is_no_cell_is_set_aside(backbone: Any) -> None:
    with pytest.raises(RowError, match="no cell"):
        backbone.prepare(Row(0, "", "ACGT"))


def test_what_does_not_fit_is_told(backbone: Any) -> None:
    row = row_of(Genes([*NAMES[:2], NAMES[0], "unknown"]), 1.5, 2, 3, 4)
    note = backbone.note(row, backbone.prepare(row))
    for part in ("28 genes of the model", "1 genes that", "1 genes named again", "whole numbers"):
        assert part in note
    row = row_of(Genes(NAMES), *range(len(NAMES)))
    assert backbone.note(row, backbone.prepare(row)) is None


def test_genes_that_are_all_unknown_end_the_run_with_a_way_out(backbone: Any) -> None:
    genes = Genes(["ENSG00000121410", "ENSG00000148584"], others=["feature_name"])
    with pytest.raises(InputError, match="none of the data's 2 genes") as caught:
        backbone.prepare(row_of(genes, 1, 2))
    assert "gene_col" in caught.value.hint and "feature_name" in caught.value.hint


def test_depth_and_values(backbone: Any) -> None:
    shallow, deep = (row_of(Genes(NAMES[:2]), *counts) for counts in ([1, 3], [10**6, 0]))
    values = backbone.collate([backbone.prepare(row) for row in (shallow, deep)])["values"]
    assert values[0, :3].tolist() == pytest.approx([np.log1p(2500), np.log1p(7500), 0])
    assert values[0, -2:].tolist() == [5, 5]
    assert values[1, -2:].tolist() == [6, 6]


def test_genes_by_name_are_pooled_alone(weights: Path, open_model: Callable[..., Any]) -> None:
    model = open_model(weights, over=("GENE7", "GENE2"))
    found = model([row_of(Genes(NAMES), *range(30))])
    assert found.mask[0].nonzero().flatten().tolist() == [2, 7]
    with pytest.raises(MgenError, match="no gene 'TP53'"):
        open_model(weights, over=("TP53",))([row_of(Genes(NAMES), *range(30))])


def test_logits_are_one_number_a_token(weights: Path, open_model: Callable[..., Any]) -> None:
    found = open_model(weights)([row_of(Genes(NAMES), *range(30))])
    assert found.logits is not None
    assert found.logits.shape == (1, 32, 1) and bool(torch.isfinite(found.logits).all())


def test_a_gene_list_is_needed_and_must_be_the_models(weights: Path, tmp_path: Path) -> None:
    row = row_of(Genes(NAMES), 1)
    with pytest.raises(WeightsError, match="gene list is needed") as caught:
        CARD.load(CARD, CARD.options()).prepare(row)
    assert "genes=PATH" in caught.value.hint
    short = tmp_path / "short.tsv"
    short.write_text("gene_name\tindex\nGENE1\t0\n")
    with pytest.raises(WeightsError, match="lists 1 different genes, the model has 30"):
        CARD.load(CARD, CARD.options(weights=weights, genes=short)).prepare(row)
    shuffled = tmp_path / "shuffled.tsv"
    shuffled.write_text("\n".join(f"G{number}" for number in range(19264)))
    with pytest.raises(WeightsError, match="in other order"):
        CARD.load(CARD, CARD.options(genes=shuffled)).prepare(row)


def test_a_cell_is_not_cut(backbone: Any) -> None:
    with pytest.raises(MgenError, match="cannot be cut"):
        backbone.truncate(backbone.prepare(row_of(Genes(NAMES), 1)), 10)
