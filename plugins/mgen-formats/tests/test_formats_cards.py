"""The plugin's face: cards that load what they promise, and import nothing heavy before."""

from __future__ import annotations

import subprocess
import sys

import pytest
from mgen_formats.plugin import READERS, WRITERS, mgen_readers, mgen_writers

from mgen_core import Reader, ReaderCard, ReaderOptions, Writer, WriterCard


def test_the_plugin_is_light() -> None:
    heavy = {"torch", "numpy", "pyarrow", "datasets", "orjson", "safetensors"}
    code = f"import sys, mgen_formats.plugin; print(*sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


@pytest.mark.parametrize("card", READERS, ids=lambda card: card.name)
def test_readers_load(card: ReaderCard) -> None:
    assert isinstance(card.load(card, ReaderOptions()), Reader)


@pytest.mark.parametrize("card", WRITERS, ids=lambda card: card.name)
def test_writers_load(card: WriterCard) -> None:
    assert isinstance(card.load(card), Writer)


def test_names_and_suffixes_are_unique() -> None:
    cards = [*mgen_readers(), *mgen_writers()]
    assert len({(type(card), card.name) for card in cards}) == len(cards)
    read = [suffix for card in READERS for suffix in card.suffixes]
    written = [card.suffix for card in WRITERS]
    assert len(set(read)) == len(read) and len(set(written)) == len(written)
