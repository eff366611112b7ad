"""A stranger's plugin, installed by pip, appears and runs; a broken one stops nothing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROJECT = """
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"
[project]
name = "{name}"
version = "0.1"
[project.entry-points.mgen]
{package} = "{package}.plugin"
"""

PLUGIN = """
from mgen_core import BackboneCard, hookimpl

def load(card, options):
    from .backbone import TinyDNA
    return TinyDNA(card, options)

@hookimpl
def mgen_backbones():
    return [BackboneCard(name="tinydna-1m", modality="dna", width=8, max_tokens=512,
                         licence="MIT", summary="A small DNA encoder", load=load)]
"""

BACKBONE = """
import torch
from mgen_core import Activations

class TinyDNA:
    def __init__(self, card, options):
        self.card = card

    def measure(self, row):
        return len(row.data)

    def collate(self, rows):
        ids = [torch.tensor(["ACGTN".find(c) + 1 for c in r.data.upper()]) for r in rows]
        return torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)

    def build(self):
        return torch.nn.Embedding(6, self.card.width)

    def forward(self, module, inputs, want):
        return Activations(hidden=module(inputs), mask=inputs > 0)
"""


def install(source: Path, target: Path, name: str, files: dict[str, str]) -> None:
    package = name.replace("-", "_")
    folder = source / name
    (folder / package).mkdir(parents=True)
    (folder / "pyproject.toml").write_text(PROJECT.format(name=name, package=package))
    for file, text in {"__init__.py": "", **files}.items():
        (folder / package / file).write_text(text)
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", target, folder],
        check=True,
    )


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("site")
    install(source, target, "mgen-tinydna", {"plugin.py": PLUGIN, "backbone.py": BACKBONE})
    install(source, target, "mgen-wreck", {"plugin.py": "import a_library_that_is_not_there"})
    return {**os.environ, "PYTHONPATH": str(target)}


def mgen(environment, *words, cwd=None):
    command = [sys.executable, "-m", "mgen_core", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=cwd)


def test_it_is_listed_and_the_broken_one_beside_it_as_broken(environment):
    listed = json.loads(mgen(environment, "list", "backbones", "--json").stdout)
    (card,) = [card for card in listed if card["name"] == "tinydna-1m"]
    assert card["plugin"] == "mgen-tinydna"
    plugins = {
        p["distribution"]: p for p in json.loads(mgen(environment, "plugins", "--json").stdout)
    }
    assert plugins["mgen-tinydna"]["offers"] == ["tinydna-1m"]
    assert "a_library_that_is_not_there" in plugins["mgen-wreck"]["problem"]
    assert "Traceback" in mgen(environment, "plugins", "-v").stdout


def test_it_runs(environment, tmp_path):
    (tmp_path / "in.csv").write_text("id,seq\nx,ACGT\ny,ac\n")
    done = mgen(environment, "embed", "in.csv", "--backbone", "tinydna-1m", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    done = mgen(environment, "merge", "predictions", cwd=tmp_path)
    assert "predictions.parquet: 2 rows" in done.stdout


def test_the_contract_check_accepts_it(environment):
    code = "from mgen_core.testing import check_backbone; check_backbone('tinydna-1m')"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
