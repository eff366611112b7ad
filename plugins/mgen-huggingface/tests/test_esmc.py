"""ESM C against transformers', and the contract of a backbone."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
import transformers
from mgen_huggingface import plugin

from mgen_core import Backbone, BackboneOptions, Row, Want, WeightsError
from mgen_core.catalog import Catalog
from mgen_core.checkpoint import open_checkpoint
from mgen_core.dense import quicken
from mgen_core.testing import check_backbone
from mgen_core.weights import fill, parameters_on_meta

CARD = next(card for card in plugin.mgen_backbones() if card.name == "esmc_300m")
LETTERS = "ACDEFGHIKLMNPQRSTVWYX"
ALL = Want(layers=(0, 1, 2, 3), logits=True)
SIZES = {
    "hidden_size": 48,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
}


def published(**config: object) -> transformers.EsmcForMaskedLM:
    torch.manual_seed(0)
    config = {**SIZES, "initializer_range": 0.3, **config}
    return transformers.EsmcForMaskedLM(transformers.EsmcConfig(**config)).eval()


def loaded(folder: Path, want: Want) -> tuple[Backbone, torch.nn.Module]:
    backbone = CARD.load(CARD, BackboneOptions(weights=folder))
    backbone.want = want
    with parameters_on_meta():
        module = backbone.build()
    cpu = torch.device("cpu")
    fill(module, backbone, open_checkpoint(folder), dtype=torch.float32, device=cpu)
    quicken(module)
    return backbone, module


def padded(batch: list[Row]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids (B, L) as transformers takes them, and where they are not padding."""
    made = transformers.EsmcTokenizer()([row.data for row in batch], padding=True)
    tokens = torch.tensor(made["input_ids"])
    return tokens, tokens != 1


def rows(*lengths: int) -> list[Row]:
    draw = random.Random(1)
    return [Row(n, str(n), "".join(draw.choices(LETTERS, k=k))) for n, k in enumerate(lengths)]


@torch.inference_mode()
@pytest.mark.parametrize("theta", [10_000.0, 500.0])
@pytest.mark.parametrize("lengths", [(33, 9, 1, 20), (12, 12)], ids=str)
def test_layers_and_logits_are_those_of_transformers(
    tmp_path: Path, lengths: list[int], theta: float
) -> None:
    theirs = published(rope_parameters={"rope_type": "default", "rope_theta": theta})
    theirs.save_pretrained(tmp_path)
    backbone, module = loaded(tmp_path, ALL)
    found = backbone.forward(module, backbone.collate(rows(*lengths)), ALL)
    tokens, seen = padded(rows(*lengths))
    expected = theirs(tokens, attention_mask=seen.long(), output_hidden_states=True)
    assert found.logits is not None
    pairs = [(found.layer(n), expected.hidden_states[n]) for n in ALL.layers]
    for ours, other in [*pairs, (found.logits, expected.logits)]:
        # Hidden states reach 240 here, so rounding is told by the largest number of a vector.
        size = other[seen].abs().amax(-1, keepdim=True).clamp(min=1)
        assert float(((ours[seen] - other[seen]).abs() / size).max()) <= 1e-5


@torch.inference_mode()
def test_an_encoder_saved_without_its_head(tmp_path: Path) -> None:
    theirs = published()
    theirs.esmc.save_pretrained(tmp_path)
    backbone, module = loaded(tmp_path, Want(layers=(3,)))
    expected = theirs.esmc(padded(rows(7, 7))[0]).last_hidden_state
    found = backbone.forward(module, backbone.collate(rows(7, 7)), Want(layers=(3,))).layer(3)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_token_numbers() -> None:
    backbone = CARD.load(CARD, BackboneOptions())
    row = Row(0, "a", "LAGVSERTIDPKQNFYMHWCXBUZO")
    tokenizer = transformers.EsmcTokenizer()
    assert backbone.collate([row])["tokens"].tolist() == tokenizer(row.data)["input_ids"]
    assert list(backbone.vocabulary[:33]) == tokenizer.convert_ids_to_tokens(range(33))
    assert len(backbone.vocabulary) == 64


@pytest.mark.parametrize(
    "config", [{"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, {"hidden_act": "gelu"}]
)
def test_another_model_is_refused(tmp_path: Path, config: dict[str, object]) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "esmc", **SIZES, **config}))
    with pytest.raises(WeightsError, match=r"config\.json"):
        CARD.load(CARD, BackboneOptions(weights=tmp_path)).build()


def test_contract(tmp_path: Path) -> None:
    published().save_pretrained(tmp_path)
    check_backbone("esmc_300m", catalog=Catalog.of(plugin), weights=tmp_path)
