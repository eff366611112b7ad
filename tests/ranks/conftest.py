"""Models, and a throw-away plugin: its model fails on one rank, where and how FAULT says."""

import os

import pytest
from ranks.models import Models

METADATA = "Metadata-Version: 2.1\nName: mgen-faults\nVersion: 0.1\n"
ENTRY_POINTS = "[mgen]\nfaults = mgen_faults\n"
PLUGIN = '''
import os
import signal
import time
from dataclasses import replace

from mgen_aido import plugin
from mgen_core import hookimpl

DUMMY = next(card for card in plugin.mgen_backbones() if card.name == "aido_dna_dummy")
FAULT = dict(item.split("=") for item in os.environ.get("FAULT", "").split())
PAUSE_S = float(os.environ.get("PAUSE", "0"))
HERE = FAULT.get("rank") in (os.environ.get("RANK", "0"), "any")
REPEATS = 30


class Faults:
    """What happens in a place; `over` a number of tokens, `after` a number of passes, or to `rows`
    that repeat a letter."""

    passes = 0
    repeats = False

    def begin(self, tokens):
        self.passes += 1
        text = bytes(tokens.tolist())
        self.repeats = any(bytes([letter]) * REPEATS in text for letter in set(text))
        time.sleep(PAUSE_S)

    def at(self, place, tokens=0):
        over, after = int(FAULT.get("over", -1)), int(FAULT.get("after", -1))
        if not (HERE and FAULT["place"] == place and tokens > over and self.passes > after):
            return
        if "rows" in FAULT and not self.repeats:
            return
        if FAULT["kind"] == "memory":
            import torch
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        if FAULT["kind"] == "bug":
            raise ValueError("a defect of the model")
        os.kill(os.getpid(), getattr(signal, FAULT["kind"]))


faults = Faults()
faults.at("import")


def load(card, options):
    backbone = DUMMY.load(DUMMY, options)
    backbone.card = card
    build = backbone.build

    def build_faulty():
        faults.at("build")
        module = build()
        watch(module.embeddings, lambda inputs: len(inputs["tokens"]), "before")
        watch(module.blocks[1].mlp, len, "layer")
        watch(module.norm, len, "behind")
        return module

    def watch(part, tokens, place):
        forward = part.forward

        def watched(x):
            if place == "before":
                faults.begin(x["tokens"])
            faults.at(place, tokens(x))
            return forward(x)

        part.forward = watched

    backbone.build = build_faulty
    return backbone


@hookimpl
def mgen_backbones():
    return [replace(DUMMY, name="faulty", load=load)]
'''


@pytest.fixture(scope="session")
def faults(tmp_path_factory):
    """The environment in which the backbone `faulty` is installed: aido_dna_dummy with faults."""
    site = tmp_path_factory.mktemp("site")
    (site / "mgen_faults.py").write_text(PLUGIN)
    info = site / "mgen_faults-0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(METADATA)
    (info / "entry_points.txt").write_text(ENTRY_POINTS)
    others = os.environ.get("PYTHONPATH")
    return {"PYTHONPATH": f"{site}{os.pathsep}{others}" if others else str(site)}


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    return Models(tmp_path_factory.mktemp("models"))
