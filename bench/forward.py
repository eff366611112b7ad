"""One forward pass of ESM2: mgen against transformers, and against what padding would cost.

    nox -s bench -- forward
    python bench/forward.py 8m --precisions fp32 --seconds 2    a quick look

Prints how many times as fast mgen is (see race.py). Weights and letters are random, the same on
all sides; lengths are those of batches of real proteins. `mgen by MKL` multiplies as PyTorch does
by itself; `equal rows` are as many rows and tokens without any difference in length.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

import material
import torch
import transformers
from mgen_huggingface import plugin
from race import DTYPES, Pass, Ready, race, rows
from torch import nn

from mgen_core import Backbone, BackboneOptions, Row, Want
from mgen_core.checkpoint import open_checkpoint
from mgen_core.dense import quicken
from mgen_core.weights import fill, parameters_on_meta

LETTERS = "ACDEFGHIKLMNPQRSTVWY"
# Letters of the rows of batches of 1,024 tokens, cut from a bacterial proteome: three after
# sorting by length, one in the order of the file.
BATCHES = (
    (113, 113, 112, 112, 112, 112, 112, 112),
    (299, 298, 297),
    (902,),
    (142, 398, 222, 264),
)
CARDS = {card.name: card for card in plugin.mgen_backbones()}


def main() -> None:
    """All races."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("sizes", nargs="*", default=["8m", "35m", "150m"])
    parser.add_argument("--precisions", nargs="+", default=list(DTYPES), choices=DTYPES)
    parser.add_argument("--seconds", type=float, default=10, help="of each race, at least")
    asked = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    for size in asked.sizes:
        with tempfile.TemporaryDirectory() as folder:
            weights = material.esm2(Path(folder), size)
            for precision in asked.precisions:
                found = contenders(weights, DTYPES[precision])
                for counts in BATCHES:
                    title = f"ESM2-{size.upper()}, {precision}"
                    race(title, found, rows(LETTERS, counts), seconds=asked.seconds)


def contenders(weights: Path, dtype: torch.dtype) -> dict[str, Ready]:
    """The same model in every form, by name."""
    card = CARDS["esm2_8m"]  # the weights decide the size
    backbone = card.load(card, BackboneOptions(weights=weights))
    backbone.want = Want(layers=(backbone.layer(-1),))
    slow, quick = (opened(backbone, weights, dtype) for _ in range(2))
    quicken(quick)
    return {
        "transformers": padded(weights, backbone, dtype),
        "equal rows": equal(packed(backbone, quick)),
        "mgen by MKL": packed(backbone, slow),
        "mgen": packed(backbone, quick),
    }


def padded(weights: Path, backbone: Backbone, dtype: torch.dtype) -> Ready:
    """Padded to the longest row, with a mask."""
    transformers.logging.set_verbosity_error()
    model = transformers.EsmModel.from_pretrained(weights, dtype=dtype, add_pooling_layer=False)

    def ready(rows: Sequence[Row]) -> Pass:
        ids = [backbone.collate([row])["tokens"] for row in rows]
        tokens = nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=1)
        seen = (tokens != 1).long()
        return lambda: model(tokens, attention_mask=seen).last_hidden_state

    return ready


def opened(backbone: Backbone, weights: Path, dtype: torch.dtype) -> nn.Module:
    with parameters_on_meta():
        module = backbone.build()
    checkpoint = open_checkpoint(weights)
    fill(module, backbone, checkpoint, dtype=dtype, device=torch.device("cpu"))
    return module


def packed(backbone: Backbone, module: nn.Module) -> Ready:
    def ready(rows: Sequence[Row]) -> Pass:
        inputs, want = backbone.collate(rows), backbone.want
        return lambda: backbone.forward(module, inputs, want).layer(*want.layers)

    return ready


def equal(ready: Ready) -> Ready:
    """The same with rows of the same length, the mean of theirs."""

    def level(given: Sequence[Row]) -> Pass:
        mean = round(sum(len(row.data) for row in given) / len(given))
        return ready(rows(LETTERS, [mean] * len(given)))

    return level


if __name__ == "__main__":
    main()
