"""Plugins are found, guarded, told apart and suggested."""

from types import SimpleNamespace

import pytest

from mgen_core import BackboneCard, PluginError, TaskCard, WriterCard, hookimpl
from mgen_core.catalog import Catalog, discover


def backbone(name):
    return BackboneCard(name, "A model", "dna", load=lambda card, options: None)


def plugin(name, *cards):
    @hookimpl
    def mgen_backbones():
        return list(cards)

    return SimpleNamespace(__name__=name, mgen_backbones=mgen_backbones)


def writer_plugin(name, *cards):
    @hookimpl
    def mgen_writers():
        return list(cards)

    return SimpleNamespace(__name__=name, mgen_writers=mgen_writers)


def broken(name, error):
    @hookimpl
    def mgen_backbones():
        raise error

    return SimpleNamespace(__name__=name, mgen_backbones=mgen_backbones)


def test_cards_are_found_by_name():
    catalog = Catalog.of(plugin("a", backbone("tiny"), backbone("big")))
    assert catalog.find(BackboneCard, "tiny").name == "tiny"
    assert [offer.card.name for offer in catalog.offers(BackboneCard)] == ["big", "tiny"]


def test_a_missing_name_suggests_near_ones():
    catalog = Catalog.of(plugin("a", backbone("esm2_8m"), backbone("aido_dna_7b")))
    with pytest.raises(PluginError) as caught:
        catalog.find(BackboneCard, "esm2_8")
    assert caught.value.what == "no backbone 'esm2_8'"
    assert "did you mean esm2_8m?" in caught.value.hint
    with pytest.raises(PluginError, match="no writer 'csv'"):
        catalog.find(WriterCard, "csv")


@pytest.mark.parametrize("error", [ValueError("boom"), ImportError("no libx"), SystemExit("bye")])
def test_a_broken_plugin_stops_no_other_and_is_named(error):
    catalog = Catalog.of(broken("bad", error), plugin("good", backbone("tiny")))
    bad = catalog.plugins[0]
    assert str(error) in bad.problem and "Traceback" in bad.traceback
    assert catalog.find(BackboneCard, "tiny").name == "tiny"
    with pytest.raises(PluginError) as caught:
        catalog.find(BackboneCard, "other")
    assert f"bad ({bad.problem})" in caught.value.hint


def test_a_name_offered_twice_is_refused_until_the_user_says_which():
    catalog = Catalog.of(plugin("a", backbone("tiny")), plugin("b", backbone("tiny")))
    assert len(catalog.offers(BackboneCard)) == 2
    with pytest.raises(PluginError) as caught:
        catalog.find(BackboneCard, "tiny")
    assert "a:tiny" in caught.value.hint and "b:tiny" in caught.value.hint
    assert catalog.find(BackboneCard, "b:tiny") is catalog.plugins[1].cards[0]


def test_a_card_of_the_wrong_kind_is_a_problem():
    task = TaskCard("embed", "", load=lambda *_: None)
    catalog = Catalog.of(plugin("odd", task))
    assert "not a BackboneCard" in catalog.plugins[0].problem


@pytest.mark.parametrize("name", ["../../x", "a/b", "", ".hidden", "a b", "a\n", "\x1b[31m", "ä"])
def test_a_name_that_could_lead_elsewhere_is_a_problem(name):
    catalog = Catalog.of(plugin("a", backbone(name)))
    assert "is no name" in catalog.plugins[0].problem and not catalog.offers(BackboneCard)


@pytest.mark.parametrize("suffix", ["/../../x", "x", ".", "", ".a/b", ".a\0"])
def test_a_suffix_that_could_lead_elsewhere_is_a_problem(suffix):
    card = WriterCard("w", suffix, "A format", load=lambda card: None)
    catalog = Catalog.of(plugin("a", backbone("good")), writer_plugin("b", card))
    assert "is no suffix" in catalog.plugins[1].problem
    assert [offer.card.name for offer in catalog.offers(BackboneCard)] == ["good"]


def test_an_unknown_hook_asks_for_a_newer_mgen():
    @hookimpl
    def mgen_dreams():
        return []

    catalog = Catalog.of(SimpleNamespace(__name__="future", mgen_dreams=mgen_dreams))
    assert "newer mgen" in catalog.plugins[0].problem


def test_mgen_plugins_narrows_what_is_loaded(monkeypatch):
    everything = {plugin.name for plugin in discover().plugins}
    monkeypatch.setenv("MGEN_PLUGINS", "tasks")
    assert {plugin.name for plugin in discover().plugins} == {"tasks"} < everything
