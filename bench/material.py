"""What the benchmarks run on: real sequences, and random weights in the published layouts."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import plain
import torch
from mgen_aido.config import parse
from mgen_aido.families import RNABERT
from mgen_aido.geometry import GEOMETRY
from safetensors.torch import save_file

ROOT = Path(__file__).parents[1]
DATA = ROOT.parent / "shared/data"
PROTEINS = DATA / "bacterial-proteome.faa"
GENES = DATA / "genes-100.fna"


def sequences(path: Path) -> list[str]:
    """Of a FASTA file, without stops, which only some tools know; ends this process without it."""
    if not path.exists():
        sys.exit(f"no {path.name} beside the repository (shared/data): nothing to measure with")
    found: list[str] = []
    for line in path.read_text().splitlines():
        if line.startswith(">"):
            found.append("")
        else:
            found[-1] += line.strip()
    return [letters.rstrip("*").replace("*", "X") for letters in found]


def spread(found: Sequence[str], rows: int) -> Sequence[str]:
    """So many of them, from all parts of the file, in its order."""
    rows = min(rows, len(found))
    return [found[place * len(found) // rows] for place in range(rows)]


def write_fasta(path: Path, found: Sequence[str]) -> Path:
    """The sequences with their places as names."""
    path.write_text("".join(f">{place}\n{letters}\n" for place, letters in enumerate(found)))
    return path


def esm2(folder: Path, size: str) -> Path:
    """Random weights of ESM2's geometry, as the tests make them."""
    maker = ROOT / "tests/layouts.py"
    words = [sys.executable, str(maker), "esm2", str(folder), "--size", size]
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
    return folder


def dna(folder: Path) -> Path:
    """Random weights of AIDO.DNA-300M's geometry."""
    folder.mkdir()
    config = {"model_type": "rnabert", "vocab_size": 16, **GEOMETRY["aido_dna_300m"]}
    (folder / "config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    module = plain.Encoder(parse(config, RNABERT))
    tensors = {f"bert.{name}": tensor for name, tensor in module.state_dict().items()}
    save_file(tensors, folder / "model.safetensors")
    return folder
