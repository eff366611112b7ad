"""Proteins with alignment and structure."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mgen_aido import plugin
from mgen_aido.rag import RagBackbone

from mgen_core import Row, RowError, WeightsError
from mgen_core.catalog import Catalog
from mgen_core.testing import check_backbone

QUERY = "ATVCGLYC"
MSA = ["-TVC-LYC", "ATV--LYX"]
STRUCTURE = np.random.default_rng(0).normal(size=(8, 6)).astype(np.float32)


@pytest.fixture
def weights(published: Callable[..., Path]) -> Path:
    return published("fm4bio", position_embedding_type="rope_2d", str_embedding_in=6)


@pytest.fixture
def backbone(weights: Path) -> RagBackbone:
    card = next(card for card in plugin.CARDS if card.name == "aido_protein_rag_3b")
    loaded = card.load(card, card.options(weights=weights))
    assert isinstance(loaded, RagBackbone)
    return loaded


def rag_row(number: int = 0, data: Any = QUERY, msa: Any = MSA, str_emb: Any = STRUCTURE) -> Row:
    return Row(number, str(number), data, {"msa": msa, "str_emb": str_emb})


def test_rows_do_not_depend_on_their_neighbours(weights: Path) -> None:
    """Also: rows without alignment, without structure and without either, in one batch."""
    batch = [
        rag_row(0),
        rag_row(1, "MKVLAAGHHKLM", None, None),
        rag_row(2, QUERY, [], STRUCTURE.tolist()),
        rag_row(3, QUERY[::-1], MSA * 3, None),
        Row(4, "4", "GATTACA"),
    ]
    catalog = Catalog.of(plugin)
    check_backbone("aido_protein_rag_3b", catalog=catalog, weights=weights, rows=batch)


def test_alignment_and_structure_change_the_numbers(weights: Path, open_model: Any) -> None:
    model = open_model("aido_protein_rag_3b", weights)
    batch = [
        rag_row(0),
        rag_row(1, msa=None),
        rag_row(2, str_emb=None),
        rag_row(3, msa=None, str_emb=None),
    ]
    found = model([model.backbone.prepare(row) for row in batch]).layer(3)
    assert found.shape[1] == len(QUERY)
    for one in range(4):
        for other in range(one):
            assert not torch.allclose(found[one], found[other], atol=1e-3)


def test_sequences_without_fields_are_alignments_of_one(weights: Path, open_model: Any) -> None:
    model = open_model("aido_protein_rag_3b", weights)
    plain, empty = model([Row(0, "", QUERY)]), model([rag_row(msa=[], str_emb=None)])
    assert torch.equal(plain.layer(3), empty.layer(3))


def test_an_a3m_file_and_a_structure_file(backbone: RagBackbone, tmp_path: Path) -> None:
    lines = [">query", QUERY, ">one", "-TVaacC-LY", "C", ">two", "ATV--L.YX"]
    (tmp_path / "a.a3m").write_text("\n".join(["#A3M", *lines]))
    np.save(tmp_path / "s.npy", STRUCTURE.astype(np.float64))
    files = rag_row(msa=str(tmp_path / "a.a3m"), str_emb=str(tmp_path / "s.npy"))
    found = backbone.collate([backbone.prepare(files)])
    expected = backbone.collate([backbone.prepare(rag_row())])
    assert torch.equal(found["tokens"], expected["tokens"])
    assert torch.equal(found["positions"], expected["positions"])
    assert torch.equal(found["structure"]["numbers"], expected["structure"]["numbers"])


def test_positions_are_columns_and_lines(backbone: RagBackbone) -> None:
    found = backbone.collate([backbone.prepare(rag_row())])
    columns = [*range(8), 1, 2, 3, 5, 6, 7, 0, 1, 2, 5, 6, 7, 0]
    lines = [0] * 8 + [1] * 6 + [2] * 6 + [0]
    assert found["positions"].tolist() == [columns, lines]
    assert found["mask"].tolist() == [[True] * 8]


def test_truncation_takes_the_alignment_first(backbone: RagBackbone) -> None:
    row = backbone.prepare(rag_row())
    assert backbone.measure(row) == 21
    for tokens, residues in ((12, 8), (9, 8), (5, 4)):
        cut = backbone.truncate(row, tokens)
        found = backbone.collate([cut])
        assert backbone.measure(cut) == tokens == len(found["tokens"])
        assert int(found["mask"].sum()) == residues
    with pytest.raises(RowError):
        backbone.truncate(row, 1)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"msa": ["ATV"]}, "msa does not fit: row 1 has 3 columns, the sequence 8 letters"),
        ({"msa": ["-TVC-LY1"]}, "msa: row 1: illegal character '1' at position 8"),
        ({"msa": 3.5}, "msa: neither sequences nor the path of an .a3m file"),
        ({"msa": [None]}, "msa: neither sequences nor the path of an .a3m file"),
        ({"msa": "nowhere.a3m"}, "msa: cannot read nowhere.a3m"),
        ({"str_emb": STRUCTURE[:5]}, r"its shape is \(5, 6\), the sequence needs \(8, 6\)"),
        ({"str_emb": STRUCTURE[:, :5]}, r"its shape is \(8, 5\), the sequence needs \(8, 6\)"),
        ({"str_emb": [1.0, 2.0]}, r"its shape is \(2,\)"),
        ({"str_emb": [["a"]]}, "str_emb: cannot be read"),
        ({"str_emb": "nowhere.npy"}, "str_emb: cannot be read"),
    ],
)
def test_fields_that_do_not_fit(backbone: RagBackbone, change: Any, reason: str) -> None:
    with pytest.raises(RowError, match=reason):
        backbone.prepare(rag_row(**change))


def test_a_pickle_is_not_run(backbone: RagBackbone, tmp_path: Path) -> None:
    np.save(tmp_path / "s.npy", np.array([object()]), allow_pickle=True)
    with pytest.raises(RowError, match="cannot be read"):
        backbone.prepare(rag_row(str_emb=str(tmp_path / "s.npy")))


def test_one_dimension_is_not_enough(published: Callable[..., Path], open_model: Any) -> None:
    with pytest.raises(WeightsError, match="position_embedding_type is 'rope'"):
        open_model("aido_protein_rag_3b", published("fm4bio", position_embedding_type="rope"))
