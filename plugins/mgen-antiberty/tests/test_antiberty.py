"""AntiBERTy against its authors' numbers, transformers' BERT, and the contract of a backbone."""

from __future__ import annotations

import json
import re
from importlib.metadata import distribution
from pathlib import Path

import pytest
import torch
from mgen_antiberty import plugin

from mgen_core import Backbone, BackboneOptions, Row, RowError, Want
from mgen_core.catalog import Catalog
from mgen_core.checkpoint import open_checkpoint
from mgen_core.dense import quicken
from mgen_core.testing import check_backbone
from mgen_core.weights import fill, parameters_on_meta

TRAINED = Path(str(distribution("antiberty").locate_file("antiberty/trained_models")))
WEIGHTS = TRAINED / "AntiBERTy_md_smooth"
(CARD,) = plugin.mgen_backbones()

HEAVY = "EVQLVESGGGLVQPGGSLRLSCAAS"
LIGHT = "DIQMTQSPSSLSASVGDRVTITC"
REFERENCE = {  # last hidden state: first residue, mean over residues; five features each
    HEAVY: (
        [-1.07388, 0.46486, -0.41645, 0.07913, -1.51958],
        [-1.11433, 0.45641, -0.66370, -0.79144, 0.08668],
    ),
    LIGHT: (
        [-1.24640, 0.38644, -0.93835, -0.38941, 1.51931],
        [-0.35199, 0.11603, -1.64471, -0.76230, 1.67259],
    ),
}


def backbone() -> Backbone:
    return CARD.load(CARD, BackboneOptions(weights=WEIGHTS))


def loaded(want: Want) -> tuple[Backbone, torch.nn.Module]:
    made = backbone()
    made.want = want
    with parameters_on_meta():
        module = made.build()
    cpu = torch.device("cpu")
    fill(module, made, open_checkpoint(WEIGHTS), dtype=torch.float32, device=cpu)
    quicken(module)
    return made, module


def rows(*sequences: str) -> list[Row]:
    return [Row(n, str(n), sequence) for n, sequence in enumerate(sequences)]


@torch.inference_mode()
def test_hidden_states_are_the_published_models() -> None:
    want = Want(layers=(8,))
    made, module = loaded(want)
    found = made.forward(module, made.collate(rows(HEAVY, LIGHT)), want)
    for hidden, mask, (first, mean) in zip(found.layer(8), found.mask, REFERENCE.values()):
        torch.testing.assert_close(hidden[1, :5], torch.tensor(first), atol=1e-4, rtol=0)
        torch.testing.assert_close(hidden[mask].mean(0)[:5], torch.tensor(mean), atol=1e-4, rtol=0)


@torch.inference_mode()
def test_every_layer_and_the_logits_are_those_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig.from_dict(json.loads((WEIGHTS / "config.json").read_text()))
    theirs = transformers.BertForMaskedLM(config).eval()
    state = torch.load(WEIGHTS / "pytorch_model.bin", map_location="cpu", weights_only=True)
    kept = {k: v for k, v in state.items() if not k.startswith(("bert.pooler", "cls.s"))}
    assert not theirs.load_state_dict(kept, strict=False).missing_keys

    want = Want(layers=tuple(range(9)), logits=True)
    made, module = loaded(want)
    ids = [made.collate([row])["tokens"] for row in rows(HEAVY, LIGHT)]
    tokens = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
    seen = tokens != 0
    expected = theirs(tokens, attention_mask=seen.long(), output_hidden_states=True)
    found = made.forward(module, made.collate(rows(HEAVY, LIGHT)), want)
    assert found.logits is not None
    pairs = [(found.layer(n), expected.hidden_states[n]) for n in range(9)]
    for ours, other in [*pairs, (found.logits, expected.logits)]:
        torch.testing.assert_close(ours[seen], other[seen], atol=1e-5, rtol=1e-5)


def test_tokens_are_line_numbers_of_the_published_vocabulary() -> None:
    lines = (TRAINED / "vocab.txt").read_text().split()
    made = backbone()
    assert list(made.vocabulary) == lines
    (row,) = rows("ACDEFGHIKLMNPQRSTVWY")
    expected = [lines.index(token) for token in ("[CLS]", *row.data, "[SEP]")]
    assert made.collate([row])["tokens"].tolist() == expected


@pytest.mark.parametrize("letter", "XBZJUO.-*")
def test_a_letter_the_model_lacks_sets_the_row_aside(letter: str) -> None:
    with pytest.raises(RowError, match=re.escape(f"illegal character {letter!r} at position 3")):
        backbone().prepare(Row(0, "a", f"EV{letter}QL"))


def test_a_trailing_stop_is_dropped_and_said() -> None:
    made = backbone()
    given = Row(0, "a", "evql*")
    prepared = made.prepare(given)
    assert prepared.data == "EVQL"
    assert made.note(given, prepared) == "trailing '*' dropped"


def test_the_longest_sequence_fits() -> None:
    made, module = loaded(Want(layers=(8,)))
    (row,) = rows("A" * (CARD.max_tokens - 2))
    assert made.measure(row) == made.max_positions == 512
    with torch.inference_mode():
        assert (
            made.forward(module, made.collate([row]), Want(layers=(8,))).layer(8).isfinite().all()
        )


def test_contract() -> None:
    # Logits reach 40, where float32 rounds at 4e-6: a sum in another order is 1e-5 away.
    check_backbone("antiberty", catalog=Catalog.of(plugin), weights=WEIGHTS, tolerance=5e-5)
