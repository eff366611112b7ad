"""`mgen infer` on proteins of a bacterium, as a gene caller wrote them."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

import mgen_core

PROTEOME = Path(__file__).parents[3] / "shared" / "data" / "bacterial-proteome.faa"
BACKBONE = "aido_protein_dummy"

pytestmark = pytest.mark.skipif(not PROTEOME.exists(), reason=f"no {PROTEOME.name} in ../shared")


def proteins(count):
    """(id, sequence without the stop) of the first records."""
    records = PROTEOME.read_text().split(">")[1 : count + 1]
    lines = [record.splitlines() for record in records]
    return [(line[0].split()[0], "".join(line[1:]).rstrip("*")) for line in lines]


def test_probabilities_of_every_residue(merged):
    table = merged("infer", PROTEOME, "--backbone", BACKBONE, "--limit", 200)
    known = proteins(200)
    assert table.column_names == ["row", "id", "probabilities"]
    assert table["row"].to_pylist() == list(range(200))
    assert table["id"].to_pylist() == [name for name, _ in known]
    names = json.loads(table.schema.metadata[b"mgen.vocabulary"])
    assert len(names) == 44
    found = table["probabilities"].combine_chunks()
    assert found.value_lengths().to_pylist() == [len(text) for _, text in known]
    vectors = found.flatten()
    assert vectors.type.list_size == len(names)
    totals = vectors.flatten().to_numpy().reshape(-1, len(names)).sum(axis=1)
    np.testing.assert_allclose(totals, 1, rtol=1e-5)


def test_masked_pll_is_what_writing_each_mask_by_hand_gives(merged):
    table = merged(
        *("infer", PROTEOME, "--backbone", BACKBONE, "--score", "masked-pll", "--limit", 3)
    )
    assert table.column_names == ["row", "id", "pll"]
    for found, (_, text) in zip(table["pll"].to_pylist(), proteins(3)):
        assert math.isclose(found, by_hand(text), rel_tol=1e-5)


def by_hand(text):
    """A text a residue, with [MASK] in its place; what the model then says of that residue."""
    texts = [f"{text[:place]}[MASK]{text[place + 1 :]}" for place in range(len(text))]
    table = mgen_core.infer(
        texts, backbone=BACKBONE, kind="logprobs", options={"tokens": "reference"}
    )
    names = json.loads(table.schema.metadata[b"mgen.vocabulary"])
    column = table["log_probabilities"]
    return sum(
        column[place][place][names.index(letter)].as_py() for place, letter in enumerate(text)
    )
