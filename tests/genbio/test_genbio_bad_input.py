"""Wrong weights and wrong sequences for GenBio's models: what is said, and that nothing is left."""

import json
import os
import pickle

import pytest
import torch
from layouts import esm2_folder

PROTEIN = "MKTAYIAKQRQISFVKSHFSRQ"
RNA, DNA, PROTEIN_MODEL = "aido_rna_1m_mars", "aido_dna_300m", "aido_protein_16b"


@pytest.fixture
def refused(mgen, tmp_path):
    """`refused(*words)`: two lines on stderr, exit 1, nothing left; what it said."""
    (tmp_path / "in.csv").write_text("id,sequence\na,ACGTACGT\nb,GGTTNACG\n")

    def run(*words, verb="embed"):
        before = sorted(tmp_path.rglob("*"))
        told = mgen(verb, *words, code=1)
        lines = told.splitlines()
        assert lines[-2].startswith("error: ") and lines[-1].startswith("  try: ")
        assert sorted(tmp_path.rglob("*")) == before
        return told

    return run


# ------------------------------------------------------------- weights


@pytest.mark.parametrize(
    ("backbone", "family", "advice"),
    [(RNA, "fm4bio", PROTEIN_MODEL), (PROTEIN_MODEL, "rnabert", DNA)],
)
def test_weights_of_the_other_family(backbone, family, advice, published, refused):
    told = refused("in.csv", "--backbone", backbone, "--weights", published(family))
    assert f"model_type is '{family}'" in told
    assert f"--backbone {advice}" in told


def test_weights_of_another_architecture(tmp_path, refused):
    esm2_folder(tmp_path / "esm2")
    told = refused("in.csv", "--backbone", PROTEIN_MODEL, "--weights", "esm2")
    assert "model_type is 'esm'" in told and "this backbone runs fm4bio" in told


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"model_type": "mystery"}, "this backbone runs rnabert"),
        ({"hidden_act": "gelu_new"}, "known: swiglu"),
        ({"position_embedding_type": "relative_key"}, "known: rope, absolute"),
        ({"vocab_size": 8}, "rnabert has 16 tokens"),
    ],
)
def test_a_config_that_cannot_be_computed(config, reason, published, refused):
    told = refused("in.csv", "--backbone", DNA, "--weights", published("rnabert", **config))
    ((field, value),) = config.items()
    assert f"config.json: {field} is {value!r}, which is not supported" in told
    assert reason in told


@pytest.mark.parametrize(
    ("family", "backbone", "size", "rows"),
    [("rnabert", DNA, 32, 16), ("fm4bio", PROTEIN_MODEL, 64, 128)],
)
def test_a_vocabulary_that_the_tensors_do_not_have(
    family, backbone, size, rows, published, refused
):
    weights = published(family, vocab_size=size)
    told = refused("in.csv", "--backbone", backbone, "--weights", weights)
    name = "bert.embeddings.word_embeddings.weight"
    assert f"{name} is ({rows}, 32) in the file, ({size}, 32) in the model" in told


@pytest.mark.parametrize("layout", ["bin-sharded", "safetensors-sharded"])
def test_a_truncated_shard(layout, published, refused):
    folder = published("rnabert", layout)
    shard = next(folder.glob("*00002-of-00002.*"))
    shard.write_bytes(shard.read_bytes()[:-1000])
    told = refused("in.csv", "--backbone", DNA, "--weights", folder)
    assert f"cannot read {shard}" in told and "incomplete or damaged" in told


def test_a_missing_shard(published, refused):
    folder = published("rnabert")
    shard = next(folder.glob("*00002-of-00002.*"))
    shard.unlink()
    told = refused("in.csv", "--backbone", DNA, "--weights", folder)
    assert "1 of 2 files" in told and shard.name in told and "download is incomplete" in told


class Attack:
    """Unpickled, it makes a folder."""

    def __init__(self, proof):
        self.proof = proof

    def __reduce__(self):
        return os.mkdir, (str(self.proof),)


def as_torch(content, path):
    torch.save(content, path)


def as_old_torch(content, path):
    torch.save(content, path, _use_new_zipfile_serialization=False)


def as_new_protocol(content, path):
    torch.save(content, path, pickle_protocol=4)


def test_a_pickle_that_is_not_of_torch_runs_nothing(tmp_path, published, refused):
    folder, proof = published("rnabert", "bin"), tmp_path / "proof"
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"extra": Attack(proof)}))
    told = refused("in.csv", "--backbone", DNA, "--weights", folder)
    assert not proof.exists()
    assert "a pickle, but not one of PyTorch" in told


@pytest.mark.parametrize(
    ("save", "reason"),
    [
        (as_torch, "it asks for posix.mkdir, which is code"),
        (as_old_torch, "it asks for posix.mkdir, which is code"),
        (as_new_protocol, "it asks for posix.mkdir, which is code"),
    ],
)
def test_a_pickle_that_would_run_code(save, reason, tmp_path, published, refused):
    folder, proof = published("rnabert", "bin"), tmp_path / "proof"
    file = folder / "pytorch_model.bin"
    save({**torch.load(file, weights_only=True), "extra": Attack(proof)}, file)
    told = refused("in.csv", "--backbone", DNA, "--weights", folder)
    assert not proof.exists()
    assert f"refused {file}: " in told and reason in told and "nothing ran" in told
    assert "Warning" not in told


def test_the_attack_is_one(tmp_path):
    pickle.loads(pickle.dumps(Attack(tmp_path / "proof")))
    assert (tmp_path / "proof").exists()


# ------------------------------------------------------------- sequences


def test_proteins_for_a_dna_model(tmp_path, refused):
    (tmp_path / "in.csv").write_text(f"sequence\n{PROTEIN}\n{PROTEIN[::-1]}\n")
    told = refused("in.csv", "--backbone", "aido_dna_dummy")
    assert "none of the 2 rows can be computed: a protein, where aido_dna_dummy takes DNA" in told
    assert "check the backbone" in told


def test_a_protein_among_dna(tmp_path, merged):
    (tmp_path / "in.csv").write_text(f"id,sequence\na,{PROTEIN}\nb,ACGT\nc,ACGT-\n")
    table = merged("embed", "in.csv", "--backbone", "aido_dna_dummy")
    errors = table["error"].to_pylist()
    assert errors[0].startswith("a protein, where aido_dna_dummy takes DNA: illegal character ")
    assert errors[1:] == [None, "illegal character '-' at position 5"]
    assert [row is None for row in table["embedding"].to_pylist()] == [True, False, True]


@pytest.fixture
def absolute(published):
    """Weights with 64 positions."""
    return ("--weights", published("rnabert", "safetensors", position_embedding_type="absolute"))


def test_a_sequence_beyond_the_positions(tmp_path, absolute, merged):
    (tmp_path / "in.csv").write_text(f"id,sequence\na,{'ACGT' * 20}\nb,{'A' * 62}\n")
    table = merged("embed", "in.csv", "--backbone", DNA, *absolute)
    error, fine = table["error"].to_pylist()
    assert "82" in error and "64" in error and fine is None
    assert [row is None for row in table["embedding"].to_pylist()] == [True, False]
    lines = (tmp_path / "predictions/failed/plan.jsonl").read_text().splitlines()
    assert [json.loads(line)["id"] for line in lines] == ["a"]


def test_a_length_beyond_the_positions(absolute, refused):
    told = refused("in.csv", "--backbone", DNA, *absolute, "--max-length", 100)
    assert "--max-length 100 is over what aido_dna_300m can take" in told and "64" in told


def test_an_unknown_option_and_an_unknown_value(refused):
    told = refused("in.csv", "--backbone", "aido_dna_dummy", "--option", "token=clean")
    assert "no option 'token'" in told and "tokens" in told
    told = refused("in.csv", "--backbone", "aido_dna_dummy", "--option", "tokens=raw")
    assert "tokens = 'raw'" in told and "'clean' or 'reference'" in told


def test_scores_that_a_backbone_cannot_give(published, refused):
    dummy = ("in.csv", "--backbone", "aido_dna_dummy", "--option", "tokens=reference")
    told = refused(*dummy, "--score", "masked-pll", verb="infer")
    assert "aido_dna_dummy cannot mask residues with tokens=reference" in told
    weights = published(
        "fm4bio", "bin", use_lm_head=False, output_vocab_size=512, tie_word_embeddings=False
    )
    structure = ("in.csv", "--backbone", "aido_protein2structoken_16b", "--weights", weights)
    told = refused(*structure, "--score", "pll", verb="infer")
    assert "gives no probabilities of residues" in told and "--kind tokens" in told
