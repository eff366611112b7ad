"""Whatever the ranks, the merged file is that of one process, byte for byte.

On a CPU with one thread; MGEN_TEST_FULL=1 tries every model on 1 to 4 ranks.
"""

import pytest
from ranks.models import SHARED
from ranks.processes import FULL, digest, lengths, run, sequences

ALL = [
    (model, strategy, devices)
    for model in ("dna", "experts", "esm2", "antiberty", "cell")
    for strategy in ("replicate", "zero3")
    for devices in (1, 2, 3, 4)
]
FEW = [
    ("dna", "zero3", 1),
    ("experts", "replicate", 2),
    ("experts", "zero3", 3),
    ("esm2", "zero3", 2),
    ("antiberty", "zero3", 2),
    ("cell", "zero3", 2),
]


@pytest.mark.parametrize(("model", "strategy", "devices"), ALL if FULL else FEW)
def test_the_merged_file_is_that_of_one_process(models, tmp_path, model, strategy, devices):
    output = tmp_path / "run"
    run(*models.words(model), output=output, devices=devices, strategy=strategy)
    assert len(list(output.glob("done/rank-*.jsonl"))) == devices
    assert digest(output) == digest(models.whole(model))


@pytest.mark.skipif(not FULL, reason="takes minutes: MGEN_TEST_FULL=1")
@pytest.mark.skipif(not SHARED.exists(), reason=f"needs {SHARED}, which is not in the repository")
@pytest.mark.parametrize("strategy", ["replicate", "zero3"])
@pytest.mark.parametrize(("model", "file"), [("esm2", "bacterial-proteome.faa"),
                                             ("dna", "genes-100.fna")])  # fmt: skip
def test_real_sequences(models, tmp_path, model, file, strategy):
    command, _, *words = models.words(model)
    words = (command, SHARED / file, *words, "--limit", 150, "--too-long", "truncate")
    run(*words, output=tmp_path / "one")
    run(*words, output=tmp_path / "four", devices=4, strategy=strategy)
    assert digest(tmp_path / "four") == digest(tmp_path / "one")


UNEVEN = {
    "one row": [30],
    "five rows": [90, 60, 30, 20, 10],
    "one long row": [3000, *[40] * 70],
}


@pytest.mark.parametrize(
    ("rows", "strategy", "devices"),
    [
        ("one row", "zero3", 4),
        ("five rows", "zero3", 4),
        ("one long row", "zero3", 2),
        *([(rows, "replicate", 4) for rows in UNEVEN] if FULL else []),
    ],
)
def test_ranks_with_less_to_do_than_others(tmp_path, rows, strategy, devices):
    """One batch, or none, on some of them: a long row counts as much as the short ones."""
    data = sequences(tmp_path / "rows.fna", "dna", UNEVEN[rows])
    words = ("embed", data, "--backbone", "aido_dna_dummy", "--batch-tokens", 100)
    run(*words, output=tmp_path / "one")
    run(*words, output=tmp_path / "several", devices=devices, strategy=strategy)
    assert digest(tmp_path / "several") == digest(tmp_path / "one")


@pytest.mark.parametrize("strategy", ["replicate", "zero3"] if FULL else ["zero3"])
def test_batches_of_many_passes(tmp_path, strategy):
    """Scored with each residue masked, a batch takes as many passes as it has residues."""
    data = sequences(tmp_path / "rows.faa", "protein", [60, *lengths(7, 4, 12)])
    words = ("infer", data, "--backbone", "aido_protein_dummy", "--score", "masked-pll",
             "--batch-tokens", 64)  # fmt: skip
    run(*words, output=tmp_path / "one")
    run(*words, output=tmp_path / "three", devices=3, strategy=strategy)
    assert digest(tmp_path / "three") == digest(tmp_path / "one")
