"""ESM2 against transformers' on folders as published, and the contract of a backbone."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from layouts import esm2_folder
from mgen_huggingface import plugin
from safetensors.torch import load_file, save_file

from mgen_core import (
    Activations,
    Backbone,
    BackboneCard,
    BackboneOptions,
    Row,
    RowError,
    Want,
    WeightsError,
)
from mgen_core.catalog import Catalog
from mgen_core.checkpoint import open_checkpoint
from mgen_core.dense import quicken
from mgen_core.testing import check_backbone
from mgen_core.weights import fill, parameters_on_meta

CARDS = {card.name: card for card in plugin.mgen_backbones()}
CARD = CARDS["esm2_8m"]
ALL = Want(layers=(0, 1, 2), logits=True)
LETTERS = "LAGVSERTIDPKQNFYMHWCXBUZO"


def loaded(folder: Path, want: Want, card: BackboneCard = CARD) -> tuple[Backbone, torch.nn.Module]:
    backbone = card.load(card, BackboneOptions(weights=folder))
    backbone.want = want
    with parameters_on_meta():
        module = backbone.build()
    cpu = torch.device("cpu")
    fill(module, backbone, open_checkpoint(folder), dtype=torch.float32, device=cpu)
    quicken(module)
    return backbone, module


def rows(*lengths: int) -> list[Row]:
    draw = random.Random(1)
    return [Row(n, str(n), "".join(draw.choices(LETTERS, k=k))) for n, k in enumerate(lengths)]


@torch.inference_mode()
def run(folder: Path, batch: Sequence[Row], want: Want) -> Activations:
    backbone, module = loaded(folder, want)
    return backbone.forward(module, backbone.collate(batch), want)


def padded(batch: Sequence[Row]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids (B, L) as transformers takes them, and where they are not padding."""
    ids = [
        torch.tensor([0, *(LETTERS.index(letter) + 4 for letter in row.data), 2]) for row in batch
    ]
    tokens = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=1)
    return tokens, tokens != 1


@torch.inference_mode()
def worst_difference(folder: Path, batch: Sequence[Row]) -> float:
    """Over all layers and the logits, at every token but padding."""
    found = run(folder, batch, ALL)
    theirs = transformers.EsmForMaskedLM.from_pretrained(folder).eval()
    tokens, seen = padded(batch)
    expected = theirs(tokens, attention_mask=seen.long(), output_hidden_states=True)
    assert found.logits is not None
    pairs = [(found.layer(n), expected.hidden_states[n]) for n in ALL.layers]
    pairs.append((found.logits, expected.logits))
    return max(float((ours[seen] - other[seen]).abs().max()) for ours, other in pairs)


@pytest.mark.parametrize("lengths", [(33, 9, 1, 20), (12, 12), (1500,)], ids=str)
def test_layers_and_logits_are_those_of_transformers(tmp_path: Path, lengths: list[int]) -> None:
    assert worst_difference(esm2_folder(tmp_path), rows(*lengths)) <= 1e-5


@pytest.mark.parametrize(
    "config",
    [{"emb_layer_norm_before": True}, {"token_dropout": False}, {"layer_norm_eps": 1e-3}],
    ids=str,
)
def test_settings_that_change_the_numbers_are_honoured(
    tmp_path: Path, config: dict[str, Any]
) -> None:
    assert worst_difference(esm2_folder(tmp_path, **config), rows(33, 9)) <= 1e-5


def test_a_head_that_is_not_tied_to_the_embedding(tmp_path: Path) -> None:
    folder = esm2_folder(tmp_path, layout="bin", tie_word_embeddings=False)
    file = folder / "pytorch_model.bin"
    state = torch.load(file, weights_only=True)
    state["lm_head.decoder.weight"] = -state["lm_head.decoder.weight"]
    torch.save(state, file)
    assert worst_difference(folder, rows(33, 9)) <= 1e-5


def test_other_rotary_base(tmp_path: Path) -> None:
    folder = esm2_folder(tmp_path, rope_theta=500.0)
    forget_frequencies(folder)
    assert worst_difference(folder, rows(33, 9)) <= 1e-5


def forget_frequencies(folder: Path) -> None:
    file = folder / "model.safetensors"
    tensors = {k: v for k, v in load_file(file).items() if not k.endswith("inv_freq")}
    save_file(tensors, file, metadata={"format": "pt"})


def test_rotary_frequencies_come_from_the_file(tmp_path: Path) -> None:
    batch = rows(900)
    stored = run(esm2_folder(tmp_path / "stored"), batch, ALL).layer(2)
    computed_folder = esm2_folder(tmp_path / "computed")
    forget_frequencies(computed_folder)
    computed = run(computed_folder, batch, ALL).layer(2)
    assert (stored - computed).abs().max() > 1e-3


@pytest.mark.parametrize("masked_lm", [True, False])
def test_folders_saved_by_transformers(tmp_path: Path, masked_lm: bool) -> None:
    kind = transformers.EsmForMaskedLM if masked_lm else transformers.EsmModel
    theirs = kind.from_pretrained(esm2_folder(tmp_path / "as-published")).eval()
    theirs.save_pretrained(tmp_path / "saved")
    found = run(tmp_path / "saved", rows(20, 7), Want(layers=(2,)))
    encoder = theirs.esm if masked_lm else theirs
    tokens, seen = padded(rows(20, 7))
    with torch.inference_mode():
        expected = encoder(tokens, attention_mask=seen.long()).last_hidden_state
    torch.testing.assert_close(found.layer(2)[seen], expected[seen], atol=1e-5, rtol=0)


def test_an_encoder_alone_has_no_logits_to_give(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"missing \(lm_head"):
        loaded(esm2_folder(tmp_path, masked_lm=False), ALL)


def test_token_numbers(tmp_path: Path) -> None:
    tokenizer = transformers.EsmTokenizer.from_pretrained(esm2_folder(tmp_path))
    (row,) = [Row(0, "a", LETTERS)]
    backbone = CARD.load(CARD, BackboneOptions())
    assert backbone.collate([row])["tokens"].tolist() == tokenizer(row.data)["input_ids"]
    assert backbone.collate([row])["tokens"].tolist() == [0, *range(4, 29), 2]
    assert list(backbone.vocabulary) == tokenizer.all_tokens


def test_residues_are_neither_special_tokens_nor_padding() -> None:
    backbone = CARD.load(CARD, BackboneOptions())
    inputs = backbone.collate([Row(0, "a", "MKV"), Row(1, "b", "M")])
    assert inputs["mask"].int().tolist() == [[0, 1, 1, 1, 0], [0, 1, 0, 0, 0]]


def test_special_tokens_are_told_from_padding(tmp_path: Path) -> None:
    """Heads of ModelGenerator's tasks count them."""
    found = run(esm2_folder(tmp_path), rows(5, 9), Want(layers=(2,)))
    assert found.tokens is not None
    assert found.tokens.sum(dim=1).tolist() == [7, 11]


@pytest.mark.parametrize(
    ("given", "prepared", "note"),
    [
        ("mkv", "MKV", None),
        ("MKV*", "MKV", "trailing '*' dropped"),
        ("MJV", "MXV", "J read as X"),
        ("MXBUZO", "MXBUZO", None),
    ],
)
def test_what_is_read_as_what(given: str, prepared: str, note: str | None) -> None:
    backbone = CARD.load(CARD, BackboneOptions())
    row = Row(0, "a", given)
    assert backbone.prepare(row).data == prepared
    assert backbone.note(row, backbone.prepare(row)) == note


@pytest.mark.parametrize("given", ["MK.V", "MK-V", "MK*V", "MK1V", "<mask>", "", "*", None])
def test_what_is_set_aside(given: str | None) -> None:
    with pytest.raises(RowError):
        CARD.load(CARD, BackboneOptions()).prepare(Row(0, "a", given))


def test_blocks_behind_the_wanted_layer_do_not_run(tmp_path: Path) -> None:
    backbone, module = loaded(esm2_folder(tmp_path, layers=3), Want(layers=(1,)))
    ran: list[int] = []
    for number, layer in enumerate(module.get_submodule("layers").children()):
        layer.register_forward_hook(lambda *_, number=number: ran.append(number))
    backbone.forward(module, backbone.collate(rows(5)), Want(layers=(1,)))
    assert ran == [0]


@pytest.mark.parametrize(
    "config",
    [
        {"position_embedding_type": "absolute"},
        {"is_folding_model": True},
        {"is_decoder": True},
        {"model_type": "bert"},
        {"vocab_size": 64},
    ],
    ids=str,
)
def test_another_model_is_refused(tmp_path: Path, config: dict[str, Any]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(settings(tmp_path / "other") | config))
    with pytest.raises(WeightsError, match=next(iter(config))):
        CARD.load(CARD, BackboneOptions(weights=tmp_path))


def test_a_config_without_its_sizes_is_refused(tmp_path: Path) -> None:
    config = settings(tmp_path / "other")
    del config["num_attention_heads"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(WeightsError, match="num_attention_heads"):
        CARD.load(CARD, BackboneOptions(weights=tmp_path))


def settings(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((esm2_folder(folder) / "config.json").read_text())
    return found


@pytest.mark.parametrize("name", [name for name in CARDS if name != "huggingface"])
def test_layers_can_be_named_before_the_weights_are_here(name: str) -> None:
    card = CARDS[name]
    backbone = card.load(card, BackboneOptions())
    assert backbone.width == card.width
    assert backbone.layer(-1) == backbone.depth > 0


def test_the_weights_decide_the_size(tmp_path: Path) -> None:
    backbone = CARD.load(CARD, BackboneOptions(weights=esm2_folder(tmp_path, hidden=64, layers=3)))
    assert (backbone.width, backbone.depth) == (64, 3)


def test_contract(tmp_path: Path) -> None:
    catalog = Catalog.of(plugin)
    check_backbone("esm2_8m", catalog=catalog, weights=esm2_folder(tmp_path, layout="bin"))


def test_transformers_is_not_imported() -> None:
    code = "import sys, mgen_huggingface.esm2, mgen_huggingface.esmc; print(*sys.modules)"
    path = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=path)
    assert done.returncode == 0, done.stderr
    assert "transformers" not in done.stdout.split()
