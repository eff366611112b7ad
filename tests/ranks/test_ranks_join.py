"""Before ranks compute: mistakes are told once, a rank that differs is refused, launchers agree."""

import json
import sys

import pytest
from layouts import esm2_folder
from ranks.processes import PATIENCE_S, Started, digest, lengths, sequences, settings, start

from mgen_core.join import free_port


@pytest.fixture
def proteins(tmp_path):
    return sequences(tmp_path / "in.faa", "protein", lengths(6, 5, 20))


def told(tmp_path, *words, **shape):
    """What three ranks say of a mistake: one error, and nothing left behind."""
    before = sorted(tmp_path.rglob("*"))
    ended = start(*words, output=tmp_path / "run", devices=3, **shape).end()
    assert ended.code == 1
    assert "Traceback" not in ended.said
    assert len(ended.errors) == 1, ended.said
    assert ended.said.rstrip().splitlines()[-1].startswith("  try: ")
    assert sorted(tmp_path.rglob("*")) == before
    return ended.errors[0]


def test_no_such_file(tmp_path):
    words = ("embed", tmp_path / "nothing.csv", "--backbone", "aido_dna_dummy")
    assert "no such file" in told(tmp_path, *words)


def test_no_such_backbone(tmp_path, proteins):
    assert "no backbone 'nothing'" in told(tmp_path, "embed", proteins, "--backbone", "nothing")


def test_weights_of_another_architecture(tmp_path, proteins):
    weights = esm2_folder(tmp_path / "esm2")
    words = ("embed", proteins, "--backbone", "aido_protein_16b", "--weights", weights)
    assert "model_type is 'esm'" in told(tmp_path, *words)


def test_weights_that_lack_a_layer(tmp_path, proteins):
    """Each rank finds it out by itself, while it reads them."""
    weights = esm2_folder(tmp_path / "esm2")
    config = json.loads((weights / "config.json").read_text())
    (weights / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    words = ("embed", proteins, "--backbone", "esm2_8m", "--weights", weights)
    assert "layer.2" in told(tmp_path, *words, strategy="zero3")


def by_hand(commands, output):
    """A rank for each command, started as a launcher of one's own would; how they ended."""
    port = str(free_port())
    ranks = []
    for rank, words in enumerate(commands):
        place = {"RANK": rank, "WORLD_SIZE": len(commands), "LOCAL_RANK": rank,
                 "LOCAL_WORLD_SIZE": len(commands), "MASTER_PORT": port}  # fmt: skip
        environ = settings(MASTER_ADDR="127.0.0.1", **{k: str(v) for k, v in place.items()})
        command = (sys.executable, "-m", "mgen_core", *map(str, words))
        ranks.append(Started(command, output, environ))
    return [rank.end() for rank in ranks]


def test_a_rank_that_would_do_another_run_is_named(tmp_path, proteins):
    (tmp_path / "other").mkdir()
    other = sequences(tmp_path / "other/in.faa", "protein", lengths(5, 5, 20))
    words = [("embed", data, "--backbone", "aido_protein_dummy")
             for data in (proteins, proteins, other)]  # fmt: skip
    ended = by_hand(words, tmp_path / "run")
    assert [rank.code for rank in ended] == [1, 1, 1]
    (error,) = [error for rank in ended for error in rank.errors]
    assert "rank 2 is about to do another run (input has changed" in error
    assert not (tmp_path / "run").exists()


def test_torchrun(models, tmp_path):
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2")
    words = map(str, (*models.words("dna"), "--strategy", "zero3"))
    command = (*torchrun, "-m", "mgen_core", *words)
    ended = Started(command, tmp_path / "run", settings()).end(PATIENCE_S)
    assert ended.code == 0, ended.said
    assert len(list((tmp_path / "run/done").iterdir())) == 2
    assert digest(tmp_path / "run") == digest(models.whole("dna"))
