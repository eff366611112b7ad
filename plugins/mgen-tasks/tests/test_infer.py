"""Probabilities and scores, against a slow and obvious reference."""

import json
import math

import pytest
import torch

import mgen_core
from mgen_core import BackboneCard, MgenError, Row, TaskCard, Want
from mgen_core.alphabet import hide
from mgen_core.catalog import discover
from mgen_core.checkpoint import seeded_checkpoint
from mgen_core.weights import fill, parameters_on_meta

NAME = "aido_protein_dummy"
TEXTS = ["MKTAYIAK", "ACDX", "W", "MKTAYIAKQRQISFVKSHFSRQ"]


@pytest.fixture(scope="module")
def model():
    """The backbone, and its logits for one text, residues only, named tokens only."""
    card = discover().find(BackboneCard, NAME)
    backbone = card.load(card, card.options())
    backbone.want = Want(logits=True)
    with parameters_on_meta():
        module = backbone.build()
    fill(module, backbone, seeded_checkpoint(module, card.seed), dtype=torch.float32,
         device=torch.device("cpu"))  # fmt: skip
    names = [name for name in backbone.vocabulary if name]

    def logits(text):
        found = backbone.forward(module, backbone.collate([Row(0, "", text)]), backbone.want)
        return found.logits[found.mask][:, : len(names)].double()

    return names, logits


def infer(**options):
    return mgen_core.infer(TEXTS, backbone=NAME, **options)


def test_probabilities_are_the_softmax_over_named_tokens(model):
    names, logits = model
    table = infer()
    assert json.loads(table.schema.metadata[b"mgen.vocabulary"]) == names
    assert len(names) == 44
    for text, found in zip(TEXTS, table["probabilities"].to_pylist()):
        expected = logits(text).softmax(-1)
        torch.testing.assert_close(torch.tensor(found).double(), expected, atol=1e-6, rtol=1e-5)


def test_kinds_agree_with_each_other(model):
    names, _ = model
    probs = infer()["probabilities"].to_pylist()
    logs = infer(kind="logprobs")["log_probabilities"].to_pylist()
    raw = infer(kind="logits")["logits"].to_pylist()
    best = infer(kind="tokens")
    assert json.loads(best.schema.metadata[b"mgen.vocabulary"])[: len(names)] == names
    for row, text in enumerate(TEXTS):
        p = torch.tensor(probs[row])
        assert p.shape == (len(text), len(names))
        torch.testing.assert_close(torch.tensor(logs[row]).exp(), p)
        torch.testing.assert_close(torch.tensor(raw[row]).softmax(-1), p)
        assert best["token"].to_pylist()[row] == p.argmax(-1).tolist()
        assert best["probability"].to_pylist()[row] == pytest.approx(p.max(-1).values.tolist())


def test_residues_alone_are_renormalised(model):
    names, logits = model
    table = infer(alphabet="residues")
    kept = json.loads(table.schema.metadata[b"mgen.vocabulary"])
    assert kept == [name for name in names if name.isalpha() and len(name) == 1]
    columns = [names.index(name) for name in kept]
    for text, found in zip(TEXTS, table["probabilities"].to_pylist()):
        expected = logits(text)[:, columns].softmax(-1)
        torch.testing.assert_close(torch.tensor(found).double(), expected, atol=1e-6, rtol=1e-5)


def test_pll_is_the_sum_of_the_residues_own_log_probabilities(model):
    names, logits = model
    for text, found in zip(TEXTS, infer(score="pll")["pll"].to_pylist()):
        scores = logits(text).log_softmax(-1)
        expected = sum(scores[i, names.index(letter)].item() for i, letter in enumerate(text))
        assert math.isclose(found, expected, rel_tol=1e-5)


@pytest.mark.parametrize("batch_tokens", [8, 64, 4096])
def test_masked_pll_hides_each_residue_in_turn(model, batch_tokens):
    names, logits = model
    table = infer(score="masked-pll", batch_tokens=batch_tokens)
    for text, found in zip(TEXTS, table["pll"].to_pylist()):
        expected = sum(
            logits(hide(text, i))[i].log_softmax(-1)[names.index(letter)].item()
            for i, letter in enumerate(text)
        )
        assert math.isclose(found, expected, rel_tol=1e-5)


def test_what_cannot_be_scored_is_refused():
    with pytest.raises(MgenError, match="gives no token probabilities"):
        mgen_core.infer(["ACGT"], backbone="dna_onehot")
    with pytest.raises(MgenError, match="cannot mask residues"):
        mgen_core.infer(
            ["ACGT"], backbone="aido_dna_dummy", score="masked-pll", options={"tokens": "reference"}
        )
    with pytest.raises(MgenError, match="--kind and --alphabet do not go with it"):
        infer(score="pll", kind="logits")
    with pytest.raises(MgenError, match="--kind and --alphabet do not go with it"):
        infer(score="pll", alphabet="residues")


@pytest.mark.parametrize("options", [{"kind": "probs"}, {"kind": "tokens"}, {"score": "pll"}])
def test_one_number_a_token_is_no_probability(options):
    backbones = discover().find(BackboneCard, NAME)
    backbone = backbones.load(backbones, backbones.options())
    backbone.vocabulary = ("expression",)
    card = discover().find(TaskCard, "infer")
    card.load(card, card.options(kind="logits"), backbone)
    with pytest.raises(MgenError, match="one number a token") as caught:
        card.load(card, card.options(**options), backbone)
    assert "--kind logits" in caught.value.hint
