"""One forward pass of GenBio's encoders: mgen against a plain implementation of the same maths.

    nox -s bench -- genbio

Prints how many times as fast mgen is (see race.py). Weights and letters are random, the same on
all sides; lengths are those of real rows. `mgen by MKL` multiplies as PyTorch does by itself.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import plain
import torch
from mgen_aido import plugin
from mgen_aido.backbone import EncoderBackbone
from mgen_aido.geometry import GEOMETRY
from mgen_aido.options import EncoderOptions
from race import DTYPES, Pass, Ready, race, rows
from torch import nn

from mgen_core import Row, Want
from mgen_core.checkpoint import Checkpoint
from mgen_core.dense import quicken
from mgen_core.weights import fill, parameters_on_meta

DATA = Path(__file__).parents[2] / "shared/data"
LONGEST = 420  # letters of a row; with longer ones a pass takes a minute
# The first such rows of two FASTA files, for where the files are not.
GENES = [252, 417, 264, 255]
PROTEINS = [142, 398, 222, 264, 241, 375]
CARDS = {card.name: card for card in plugin.CARDS}
RNA_650M = GEOMETRY["aido_rna_650m"]
# AIDO.Protein-16B at a quarter of its width and a sixth of its depth.
MIXTURE = {
    **GEOMETRY["aido_protein_16b"],
    "hidden_size": 576,
    "num_hidden_layers": 6,
    "num_attention_heads": 9,
    "intermediate_size": 1920,
}


def main() -> None:
    """All races."""
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    genes = lengths("genes-100.fna", GENES)
    proteins = lengths("bacterial-proteome.faa", PROTEINS)
    for precision in DTYPES:
        dense = contenders("aido_rna_650m", RNA_650M, precision)
        for counts in ([30], genes[:1], genes):
            race(f"AIDO.RNA-650M, {precision}", dense, rows("ACGT", counts))
        del dense
        mixture = contenders("aido_protein_16b", MIXTURE, precision)
        for counts in (proteins[:1], proteins):
            title = f"AIDO.Protein-16B scaled down, {precision}"
            race(title, mixture, rows("ACDEFGHIKLMNPQRSTVWY", counts))


def lengths(file: str, known: list[int]) -> list[int]:
    """Letters of the first rows of a file that are not too long; `known` without the file."""
    if not (DATA / file).exists():
        return known
    found: list[int] = []
    for line in (DATA / file).read_text().splitlines():
        if line.startswith(">"):
            found.append(0)
        else:
            found[-1] += len(line)
    return [length for length in found if length <= LONGEST][: len(known)]


# --------------------------------------------------------------------------- who runs


def contenders(card: str, config: Mapping[str, Any], precision: str) -> dict[str, Ready]:
    """The same model in every form, by name; mgen's own last."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(config))
        loose, fused = (opened(card, Path(folder), fuse) for fuse in (False, True))
    dtype = DTYPES[precision]
    torch.manual_seed(0)
    first = textbook(loose, dtype)
    tensors = first.state_dict()
    found = {"plain": padded(loose, first)}
    if loose.known.experts:
        every = textbook(loose, dtype, plain.AllExperts)
        every.load_state_dict(tensors)
        found["all experts"] = padded(loose, every)
    published = Checkpoint(None, {f"bert.{name}": tensor for name, tensor in tensors.items()})
    found["mgen by MKL"] = packed(loose, published, dtype, quick=False)
    found["mgen"] = packed(loose, published, dtype)
    found["mgen fuse=true"] = packed(fused, published, dtype)
    return found


def opened(card: str, folder: Path, fuse: bool) -> EncoderBackbone:
    backbone = CARDS[card].load(CARDS[card], EncoderOptions(weights=folder, fuse=fuse))
    assert isinstance(backbone, EncoderBackbone)
    backbone.want = Want(layers=(backbone.known.depth,))
    return backbone


def textbook(
    backbone: EncoderBackbone, dtype: torch.dtype, mixture: type[plain.Mixture] = plain.Mixture
) -> plain.Encoder:
    """Random weights in `dtype`; routers stay float32, as GenBio's do."""
    module = plain.Encoder(backbone.known, mixture).to(dtype)
    for part in module.modules():
        if isinstance(part, plain.Mixture):
            part.router.float()
    return module


def padded(backbone: EncoderBackbone, module: nn.Module) -> Ready:
    def ready(rows: Sequence[Row]) -> Pass:
        ids = [backbone.collate([row])["tokens"] for row in rows]
        tokens = nn.utils.rnn.pad_sequence(ids, batch_first=True)
        return lambda: module(tokens)

    return ready


def packed(
    backbone: EncoderBackbone, published: Checkpoint, dtype: torch.dtype, *, quick: bool = True
) -> Ready:
    with parameters_on_meta():
        module = backbone.build()
    fill(module, backbone, published, dtype=dtype, device=torch.device("cpu"))
    if quick:
        quicken(module)

    def ready(rows: Sequence[Row]) -> Pass:
        inputs, want = backbone.collate(rows), backbone.want
        return lambda: backbone.forward(module, inputs, want).layer(*want.layers)

    return ready


if __name__ == "__main__":
    main()
