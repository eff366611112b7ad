"""Numbers of the reference, from its own files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mgen_cell.cell import Cell, Genes, Neighbourhood
from mgen_cell.genes import Aligned, read_list
from mgen_cell.plugin import READERS
from safetensors.torch import load_file
from typer.testing import CliRunner

import mgen_core
from mgen_core import Row
from mgen_core.cli import app

SHARED = Path(__file__).parents[4] / "shared"
GOLDEN = SHARED / "golden"
LIST = SHARED / "data" / "OS_scRNA_gene_index.19264.tsv"
WHOLE = GOLDEN / "cell-19264-layernorm"
MINI = sorted(GOLDEN.glob("cell-mini-*"))

pytestmark = pytest.mark.skipif(not MINI, reason="no golden data in ../shared/golden")


def expected_of(case: Path) -> dict[str, torch.Tensor]:
    return load_file(case / "expected" / "expected.safetensors")


def worst(found: torch.Tensor, expected: torch.Tensor) -> float:
    assert found.shape == expected.shape
    return float((found - expected).abs().max())


@pytest.fixture
def mini_list(tmp_path: Path) -> Path:
    path = tmp_path / "genes.tsv"
    lines = [f"G{number}\t{number}\n" for number in range(256)]
    path.write_text("gene_name\tindex\n" + "".join(lines))
    return path


@pytest.mark.parametrize("case", MINI, ids=lambda case: case.name)
def test_every_layer_and_the_logits_agree(case: Path, open_model: Any, mini_list: Path) -> None:
    expected = expected_of(case)
    model = open_model(case / "model", genes=mini_list)
    genes = Genes([f"G{number}" for number in range(256)])
    rows = [
        Row(number, "", Cell(genes, np.arange(256), counts))
        for number, counts in enumerate(expected["counts"].numpy())
    ]
    inputs = model.backbone.collate([model.backbone.prepare(row) for row in rows])
    assert worst(inputs["values"], expected["preprocessed"]) <= 1e-6
    found = model.run(inputs)
    assert found.logits is not None
    layers = torch.stack([found.layer(number) for number in sorted(found.hidden)])
    assert worst(layers, expected["hidden_states"]) <= 1e-5
    assert worst(found.layer(2), expected["last_hidden_state"]) <= 1e-5
    assert worst(found.logits.squeeze(-1), expected["logits"]) <= 1e-5


@pytest.mark.parametrize("case", MINI, ids=lambda case: case.name)
def test_hidden_and_missing_values_and_other_positions_agree(case: Path, open_model: Any) -> None:
    expected = expected_of(case)
    module = open_model(case / "model").module
    values = expected["preprocessed_with_mask_and_pad"]
    with torch.inference_mode():
        hidden, logits = module(values, torch.arange(258), (2,), True)
        backwards, _ = module(expected["preprocessed"], torch.arange(257, -1, -1), (2,), False)
    assert worst(hidden[2], expected["last_hidden_state_with_mask_and_pad"]) <= 1e-5
    assert worst(logits.squeeze(-1), expected["logits_with_mask_and_pad"]) <= 1e-5
    assert worst(backwards[2], expected["last_hidden_state_reversed_position_ids"]) <= 1e-5


def cells_of_golden(reader: str = "h5ad") -> list[Row]:
    card = next(card for card in READERS if card.name == reader)
    name = "counts.csv" if reader == "counts" else "counts.h5ad"
    rows = card.load(card, card.options()).open(str(WHOLE / "input" / name))
    return [Row(n, "", cell) for c in rows.chunks(["X"]) for n, cell in enumerate(c["X"])]


def test_a_cell_of_19264_genes_agrees(open_model: Any) -> None:
    expected = expected_of(WHOLE)
    model = open_model(WHOLE / "model", genes=LIST, over=("present",))
    rows = [model.backbone.prepare(row) for row in cells_of_golden()]
    inputs = model.backbone.collate(rows)
    assert worst(inputs["values"], expected["preprocessed"]) <= 1e-6
    assert torch.equal(inputs["mask"], expected["gene_present_mask"].bool().expand(3, -1))
    found = model.run(model.backbone.collate(rows[:1]))
    assert isinstance(found.hidden, dict) and found.logits is not None
    layers = torch.stack([hidden[0, expected["positions"]] for hidden in found.hidden.values()])
    assert worst(layers, expected["hidden_states_cell0_at_positions"]) <= 1e-5
    assert worst(found.layer(2)[0], expected["last_hidden_state_full_cell0"]) <= 1e-5
    assert worst(found.logits[0].squeeze(-1), expected["logits"][0]) <= 1e-5
    pooled = found.layer(2)[found.mask].mean(0)
    assert worst(pooled, expected["mean_present_mask_weighted"][0]) <= 1e-5


def test_reference_rounds_its_input(open_model: Any) -> None:
    model = open_model(WHOLE / "model", genes=LIST, as_reference=True)
    row = model.backbone.prepare(cells_of_golden()[0])
    values = model.backbone.collate([row])["values"][0]
    assert torch.equal(values, expected_of(WHOLE)["preprocessed_bf16_roundtrip_cell0"])


def test_the_command_line_agrees(tmp_path: Path) -> None:
    words = ["embed", str(WHOLE / "input" / "counts.h5ad"), "--backbone", "aido_cell_3m"]
    words += ["--weights", str(WHOLE / "model"), "--option", f"genes={LIST}", "--limit", "1"]
    words += ["--output", str(tmp_path / "run"), "--pool", "mean", "--pool", "max"]
    done = CliRunner().invoke(app, words, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    table = mgen_core.read(tmp_path / "run")
    expected = expected_of(WHOLE)
    for pool in ("mean", "max"):
        found = torch.tensor(table[f"embedding_{pool}_-1"].to_pylist())
        assert worst(found, expected[f"{pool}_genes_only"][:1]) <= 1e-5
    assert table["id"].to_pylist() == ["cell0"]


def test_csv_and_h5ad_hold_the_same_cells(open_model: Any) -> None:
    backbone = open_model(WHOLE / "model", genes=LIST).backbone
    pairs = zip(cells_of_golden("h5ad"), cells_of_golden("counts"), strict=True)
    for one, other in pairs:
        found = [backbone.collate([backbone.prepare(row)])["values"] for row in (one, other)]
        assert torch.equal(*found)


def test_alignment_agrees() -> None:
    case = json.loads((GOLDEN / "cell-align-duplicates" / "align.json").read_text())
    genes = Genes(case["input_gene_ids"])
    aligned = Aligned(genes, case["reference_genes"])
    for counts, expected in zip(case["input_counts"], case["aligned_counts"]):
        cell = Cell(genes, np.arange(len(counts)), np.array(counts))
        places, found = aligned.counts(cell)
        assert np.bincount(places, found, len(expected)).tolist() == expected


TISSUE = GOLDEN / "cell-tissue-layernorm"
CASES = ("single_b1", "single_b2", "multi3_b1", "multi2_b2", "multi3_xy_b1")
SEPARATOR = -10_000


def samples(case: str, expected: dict[str, torch.Tensor]) -> list[Row]:
    """The rows of a case: counts of its cells and, for some, where they are."""
    matrix = torch.zeros(*expected[f"{case}.input_shape"].tolist())
    where = expected[f"{case}.input_nonzero_index"].T
    matrix[where[0], where[1]] = expected[f"{case}.input_nonzero_value"]
    genes = Genes(read_list(LIST, 19264))
    rows = []
    for number, numbers in enumerate(matrix.numpy()):
        counts, *axes = np.split(numbers, np.flatnonzero(numbers == SEPARATOR))
        slots = counts.reshape(-1, 19264)
        cells = tuple(Cell(genes, np.flatnonzero(slot), slot[slot != 0]) for slot in slots)
        xy = np.stack([axis[1:] for axis in axes], axis=1) if axes else np.zeros((len(cells), 2))
        alone = len(cells) == 1
        rows.append(Row(number, "", cells[0] if alone else Neighbourhood(cells, xy)))
    return rows


@pytest.mark.parametrize("case", CASES)
def test_tissue_agrees(case: str, open_model: Any) -> None:
    options = {"genes": LIST, "use_xy": "xy" in case, "as_reference": True}
    model = open_model(TISSUE / "model", name="aido_tissue_3m", **options)
    expected = expected_of(TISSUE)
    rows = [model.backbone.prepare(row) for row in samples(case, expected)]
    inputs = model.backbone.collate(rows)
    assert torch.equal(inputs["values"].view(len(rows), -1), expected[f"{case}.gathered_values"])
    places = inputs["places"].view(2, len(rows), -1).transpose(0, 1)
    assert torch.equal(places, expected[f"{case}.rope_ids"])
    found = model.run(inputs)
    out = expected[f"{case}.backbone_last_hidden_state"]
    assert worst(found.layer(2), out) <= 1e-5
    own = expected.get(f"{case}.backbone_attention_mask", torch.ones(out.shape[:2]))
    assert torch.equal(found.mask, own.bool())
    assert found.logits is not None
    logits = expected[f"{case}.logits"][:, : found.mask.shape[1]]
    assert float((found.logits.squeeze(-1) - logits)[found.mask].abs().max()) <= 1e-5


@pytest.mark.parametrize("case", ["single_b1", "multi3_b1"])
def test_tissue_alone_is_the_reference_alone(case: str, open_model: Any) -> None:
    expected = expected_of(TISSUE)
    model = open_model(TISSUE / "model", name="aido_tissue_3m", genes=LIST)
    found = model(samples(case, expected) * 2)
    own = expected[f"{case}.backbone_last_hidden_state"][0]
    for row in range(2):
        mine = found.layer(2)[row][found.mask[row]]
        assert worst(mine, own[: len(mine)]) <= 1e-5
