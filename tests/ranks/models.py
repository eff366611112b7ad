"""Models that ranks are tried with, and the run of each in one process."""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from cells import AIDO_CELL_3M, cell_folder, h5ad_file
from layouts import ESM2_SIZES, esm2_folder, write_layout
from ranks.processes import lengths, run, sequences

ROOT = Path(__file__).parents[2]
SHARED = ROOT.parent / "shared/data"


def experts_folder(path: Path) -> Path:
    """A mixture of experts, named as in AIDO.Protein-16B, in sizes that ranks do not divide."""
    wide, inner, layers, experts = 20, 7, 3, 5
    shapes = {"embeddings.word_embeddings": (128, wide), "encoder.ln": (wide,)}
    for layer in range(layers):
        place = f"encoder.layer.{layer}"
        for part in ("self.query", "self.key", "self.value", "output.dense"):
            shapes[f"{place}.attention.{part}"] = (wide, wide)
        shapes |= {f"{place}.attention.ln": (wide,), f"{place}.ln": (wide,)}
        shapes[f"{place}.mlp.router"] = (experts, wide)
        for expert in range(experts):
            shapes[f"{place}.mlp.dense_h_to_4h_{expert}"] = (2 * inner, wide)
            shapes[f"{place}.mlp.dense_4h_to_h_{expert}"] = (wide, inner)
    draw = torch.Generator().manual_seed(3)
    tensors = {
        f"bert.{name}.weight": torch.randn(shape, generator=draw) / math.sqrt(shape[-1])
        if len(shape) > 1
        else torch.ones(shape)
        for name, shape in shapes.items()
    }
    stored = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    write_layout(path, stored, "safetensors-sharded")
    config = {
        "model_type": "fm4bio",
        "hidden_size": wide,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "intermediate_size": inner,
        "add_linear_bias": False,
        "moe": True,
        "num_experts": experts,
        "experts_per_token": 2,
        "use_lm_head": False,
        "tie_word_embeddings": False,
    }
    (path / "config.json").write_text(json.dumps(config))
    return path


class Models:
    """What to type for each model, and the run directory of one undisturbed process."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._words: dict[str, tuple[object, ...]] = {}
        self._whole: dict[str, Path] = {}

    def words(self, name: str) -> tuple[object, ...]:
        """The command, but for --output and the ranks."""
        if name not in self._words:
            self._words[name] = getattr(self, f"_{name}")()
        return self._words[name]

    def whole(self, name: str) -> Path:
        if name not in self._whole:
            self._whole[name] = self.folder / f"{name}-whole"
            run(*self.words(name), output=self._whole[name])
        return self._whole[name]

    def _dna(self) -> tuple[object, ...]:
        data = sequences(self.folder / "dna.fna", "dna", lengths(40, 20, 300))
        pools = ("--pool", "tokens", "--pool", "mean", "--layers", "0,-1")
        return ("embed", data, "--backbone", "aido_dna_dummy", *pools, "--batch-tokens", 512)

    def _experts(self) -> tuple[object, ...]:
        # A few tokens each: batches visit different experts.
        data = sequences(self.folder / "short.faa", "protein", lengths(50, 1, 9))
        weights = experts_folder(self.folder / "experts")
        return ("embed", data, "--backbone", "aido_protein_16b", "--weights", weights, "--pool",
                "tokens", "--batch-tokens", 12)  # fmt: skip

    def _esm2(self) -> tuple[object, ...]:
        data = sequences(self.folder / "proteins.faa", "protein", lengths(24, 10, 120))
        depth, wide, heads = ESM2_SIZES["8m"]
        weights = esm2_folder(self.folder / "esm2", hidden=wide, layers=depth, heads=heads)
        return ("infer", data, "--backbone", "esm2_8m", "--weights", weights,
                "--batch-tokens", 256)  # fmt: skip

    def _cell(self) -> tuple[object, ...]:
        genes = [f"GENE{number}" for number in range(200)]
        data = h5ad_file(self.folder / "cells.h5ad", 15, genes)
        weights = cell_folder(self.folder / "cell", genes=genes, **AIDO_CELL_3M)
        return ("embed", data, "--backbone", "aido_cell_3m", "--weights", weights, "--pool",
                "tokens", "--pool", "mean")  # fmt: skip

    def _antiberty(self) -> tuple[object, ...]:
        data = ROOT / "examples/antibodies.csv"
        return ("embed", data, "--backbone", "antiberty", "--pool", "tokens",
                "--batch-tokens", 256)  # fmt: skip
