"""Every backbone that runs without a download keeps the contract."""

import pytest
from layouts import bert_folder, esm2_folder

from mgen_core import BackboneCard, Row
from mgen_core.catalog import discover
from mgen_core.testing import check_backbone, check_card, check_light

CARDS = [offer.card for offer in discover().offers(BackboneCard)]
WITHOUT_WEIGHTS = [card.name for card in CARDS if not card.weights and not card.weights_required]


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.name)
def test_cards_are_complete_and_light(card):
    check_card(card)
    check_light(card)


@pytest.mark.parametrize("name", WITHOUT_WEIGHTS)
def test_backbones_without_weights(name):
    check_backbone(name)


def test_antiberty():
    check_backbone("antiberty")


def test_esm2(tmp_path):
    esm2_folder(tmp_path / "esm2")
    check_backbone("esm2_8m", weights=tmp_path / "esm2")


@pytest.mark.parametrize("folder", [bert_folder, esm2_folder])
def test_generic_huggingface(tmp_path, folder):
    folder(tmp_path / "model")
    letters = ["ACDEF", "GHIKLMNPQR", "A", "ST"]
    rows = [Row(n, f"r{n}", text) for n, text in enumerate(letters)]
    check_backbone("huggingface", weights=tmp_path / "model", rows=rows)
