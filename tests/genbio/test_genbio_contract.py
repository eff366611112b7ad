"""A row's vectors do not depend on its batch, whatever the architecture of the weights."""

from pathlib import Path

import pytest
from safetensors.torch import load_file

from mgen_core import Row
from mgen_core.testing import check_backbone

GOLDEN = Path(__file__).parents[3] / "shared" / "golden"
NUCLEOTIDES = sorted(GOLDEN.glob("rnabert-*"))
PROTEINS = [case for case in sorted(GOLDEN.glob("fm4bio-*")) if "rag" not in case.name]
RAG = GOLDEN / "fm4bio-moe-rag-rope2d"

pytestmark = pytest.mark.skipif(not RAG.exists(), reason="no golden data in ../shared/golden")


@pytest.mark.parametrize("tokens", ["clean", "reference"])
@pytest.mark.parametrize("case", NUCLEOTIDES, ids=lambda case: case.name)
def test_nucleotides(case, tokens):
    check_backbone("aido_dna_300m", weights=case / "model", options={"tokens": tokens})


@pytest.mark.parametrize("case", PROTEINS, ids=lambda case: case.name)
def test_proteins(case):
    check_backbone("aido_protein_16b", weights=case / "model")


def test_retrieval_with_and_without_alignment_and_structure():
    structure = load_file(RAG / "expected.safetensors")["b0.str_emb.0"].tolist()
    query, aligned = "ATVCGLYCQVSFNEI", ["----RRWQCISH-SF", "DSE-I-D-QHI-DG-", "VNQ-VL-CEE-H--H"]
    fields = [
        {"msa": aligned, "str_emb": structure},
        {"msa": aligned[:1], "str_emb": None},
        {"msa": None, "str_emb": structure},
        {"msa": None, "str_emb": None},
    ]
    rows = [Row(number, f"row-{number}", query, more) for number, more in enumerate(fields)]
    rows.append(Row(4, "row-4", query[:4], {"msa": [line[:4] for line in aligned[1:]]}))
    check_backbone("aido_protein_rag_16b", weights=RAG / "model", rows=rows)
