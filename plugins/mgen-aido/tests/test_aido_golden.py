"""Numbers and token ids of the reference, from its own files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mgen_core import Activations, Row
from mgen_core.packed import pack

GOLDEN = Path(__file__).parents[4] / "shared" / "golden"
CASES = sorted(GOLDEN.glob("rnabert-*")) + sorted(GOLDEN.glob("fm4bio-*"))
TOLERANCE = {"rnabert": 1e-5, "fm4bio": 1e-4}

pytestmark = pytest.mark.skipif(not CASES, reason="no golden data in ../shared/golden")


def card_of(model: Path) -> str:
    config = json.loads((model / "config.json").read_text())
    if config["position_embedding_type"] == "rope_2d":
        return "aido_protein_rag_16b"
    return {"rnabert": "aido_dna_dummy", "fm4bio": "aido_protein_dummy"}[config["model_type"]]


def batches(case: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, batch in enumerate(json.loads((case / "case.json").read_text())["batches"]):
        if batch["ok"]:
            yield number, batch


def worst(found: torch.Tensor, expected: torch.Tensor, where: torch.Tensor) -> float:
    width = found.shape[1]
    return float((found - expected[:, :width])[where].abs().max())


def differences(
    found: Activations, expected: dict[str, torch.Tensor], real: torch.Tensor
) -> list[float]:
    assert isinstance(found.hidden, dict) and found.logits is not None
    layers = [
        worst(hidden, expected[f"hidden_states.{number}"], real)
        for number, hidden in found.hidden.items()
    ]
    last = worst(found.hidden[len(layers) - 1], expected["last_hidden_state"], real)
    return [*layers, last, worst(found.logits, expected["logits"], real)]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_layer_and_the_logits_agree(case: Path, open_model: Any) -> None:
    model = open_model(card_of(case / "model"), case / "model", tokens="reference")
    golden = load_file(case / "expected.safetensors")
    family = case.name.split("-")[0]
    for number, batch in batches(case):
        expected = {
            key.removeprefix(f"b{number}."): value
            for key, value in golden.items()
            if key.startswith(f"b{number}.")
        }
        if batch.get("rag"):
            inputs, real = rag_inputs(model.backbone, batch, expected)
        else:
            inputs, real = plain_inputs(model.backbone, batch, expected)
        found = model.run(inputs)
        if not batch.get("rag"):
            residues = real & (expected["in.special_tokens_mask"] == 0)
            assert torch.equal(found.mask, residues), batch["name"]
        assert max(differences(found, expected, real)) <= TOLERANCE[family], batch["name"]


def plain_inputs(
    backbone: Any, batch: dict[str, Any], expected: dict[str, torch.Tensor]
) -> tuple[Any, torch.Tensor]:
    rows = [Row(number, "", text) for number, text in enumerate(batch["sequences"])]
    if batch["max_length"]:
        rows = [cut(backbone, row, batch["max_length"]) for row in rows]
    if batch.get("add_special_tokens", True):
        inputs = backbone.collate(rows)
    else:
        inputs = pack([backbone.tokens.encode(row.data) for row in rows])
    real = expected["in.attention_mask"].bool()
    # Packed tokens, back in their rows: `slots` is None where they are in place already.
    ids = torch.zeros(real.numel(), dtype=torch.int64)
    slots = inputs["slots"] if inputs["slots"] is not None else torch.arange(real.numel())
    ids[slots] = inputs["tokens"]
    assert torch.equal(ids.view(real.shape), expected["in.input_ids"]), batch["name"]
    assert torch.equal(torch.bincount(slots, minlength=real.numel()).view(real.shape), real.long())
    return inputs, real


def rag_inputs(
    backbone: Any, batch: dict[str, Any], expected: dict[str, torch.Tensor]
) -> tuple[Any, torch.Tensor]:
    fields = {"msa": batch["msa"][0], "str_emb": expected["str_emb.0"].tolist()}
    row = backbone.prepare(Row(0, "", batch["sequences"][0], fields))
    inputs = backbone.collate([cut(backbone, row, batch["max_length"])])
    assert torch.equal(inputs["tokens"][None], expected["in.input_ids"]), batch["name"]
    assert torch.equal(inputs["positions"][None], expected["in.position_ids"]), batch["name"]
    return inputs, inputs["mask"]


def cut(backbone: Any, row: Row, tokens: int) -> Row:
    return backbone.truncate(row, tokens) if backbone.measure(row) > tokens else row


@pytest.mark.parametrize("case", CASES[:4], ids=lambda case: case.name)
def test_fused_attention_stays_within_rounding(case: Path, open_model: Any) -> None:
    # Both are as far from the truth (the same computed in float64) as from each other: 3e-5,
    # where logits reach 37.
    read = open_model(card_of(case / "model"), case / "model", tokens="reference").backbone
    model = open_model(card_of(case / "model"), case / "model", tokens="clean")
    golden = load_file(case / "expected.safetensors")
    expected = {key[3:]: value for key, value in golden.items() if key.startswith("b0.")}
    texts = json.loads((case / "case.json").read_text())["batches"][0]["sequences"]
    found = model.run(read.collate([Row(0, "", text) for text in texts]))
    assert max(differences(found, expected, expected["in.attention_mask"].bool())) <= 5e-5


@pytest.mark.parametrize(
    "run", sorted(GOLDEN.glob("cli-*/out_*_pt")), ids=lambda run: run.parent.name
)
def test_predictions_of_the_command_line_agree(run: Path, open_model: Any) -> None:
    base = json.loads((run.parent / "case.json").read_text())["base_model_case"]
    weights = GOLDEN / base / "model" if base else None
    onehot = "dna_onehot" if "dna" in run.parent.name else "protein_onehot"
    name = card_of(weights) if weights else onehot
    model = open_model(name, weights, logits=base is not None, tokens="reference")
    stored = load_file(run / "predict_predictions_readable.safetensors")
    texts = json.loads((run / "predict_predictions_readable.json").read_text())["sequences"]
    found = model([cut(model.backbone, Row(0, "", text), 30 if base else 20) for text in texts])
    hidden = found.layer(model.backbone.layer(-1))
    for number, residues in enumerate(found.mask):
        if "predictions" in stored:
            assert found.logits is not None
            got, expected = found.logits[number], stored["predictions"][number]
        else:
            got, expected = hidden[number], stored[f"predictions.{number}.last_hidden_state"]
        where = residues.nonzero().squeeze(1)
        assert float((got[where] - expected[where]).abs().max()) <= 1e-5
