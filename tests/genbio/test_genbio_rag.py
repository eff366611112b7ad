"""Scores of retrieval models, against each residue masked by hand."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mgen_core import BackboneCard, Row, Want
from mgen_core.catalog import discover
from mgen_core.checkpoint import open_checkpoint
from mgen_core.weights import fill, parameters_on_meta

CASE = Path(__file__).parents[3] / "shared" / "golden" / "fm4bio-moe-rag-rope2d"
NAME, WEIGHTS = "aido_protein_rag_16b", CASE / "model"
QUERY = "ATVCGLYCQVSFNEI"
ALIGNED = ["----RRWQCISH-SF", "DSE-I-D-QHI-DG-"]

pytestmark = pytest.mark.skipif(not CASE.exists(), reason="no golden data in ../shared/golden")


@pytest.fixture(scope="module")
def rows():
    """One query with alignment and structure, with one of them, and alone."""
    structure = load_file(CASE / "expected.safetensors")["b0.str_emb.0"].tolist()
    fields = [(ALIGNED, structure), (ALIGNED, None), (None, structure), (None, None)]
    return [
        {"id": str(number), "sequence": QUERY, "msa": msa, "str_emb": numbers}
        for number, (msa, numbers) in enumerate(fields)
    ]


@pytest.fixture(scope="module")
def by_hand():
    """`by_hand(row, max_length, masked)`: the sum over the query's residues."""
    card = discover().find(BackboneCard, NAME)
    backbone = card.load(card, card.options(weights=WEIGHTS))
    backbone.want = Want(logits=True)
    with parameters_on_meta():
        module = backbone.build()
    fill(module, backbone, open_checkpoint(WEIGHTS), dtype=torch.float32,
         device=torch.device("cpu"))  # fmt: skip
    mask = backbone.vocabulary.index("[MASK]")

    def score(line, max_length, masked):
        fields = {name: line[name] for name in ("msa", "str_emb")}
        row = backbone.truncate(backbone.prepare(Row(0, "", QUERY, fields)), max_length)
        inputs = backbone.collate([row])
        tokens, total = inputs["tokens"], 0.0
        for place in range(int(inputs["mask"].sum())):
            hidden = tokens.clone()
            if masked:
                hidden[place] = mask
            found = backbone.forward(module, {**inputs, "tokens": hidden}, backbone.want)
            total += float(found.logits[0, place, :44].log_softmax(-1)[tokens[place]])
        return total

    return score


@pytest.mark.parametrize("score", ["pll", "masked-pll"])
@pytest.mark.parametrize("max_length", [64, 30, 10])
def test_scores(score, max_length, rows, by_hand, merged, tmp_path):
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    table = merged(
        *("infer", "in.jsonl", "--backbone", NAME, "--weights", WEIGHTS, "--score", score),
        *("--max-length", max_length, "--too-long", "truncate"),
    )
    for found, row in zip(table["pll"].to_pylist(), rows):
        expected = by_hand(row, max_length, masked=score == "masked-pll")
        assert math.isclose(found, expected, rel_tol=1e-5)
