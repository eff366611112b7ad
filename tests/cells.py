"""Small models of cells in the published layout, and files of counts for them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from safetensors.torch import save_file

from mgen_core import Want
from mgen_core.checkpoint import seeded_checkpoint

GENES = [f"GENE{number}" for number in range(30)]
AIDO_CELL_3M = {
    "hidden_size": 128,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "intermediate_size": 320,
    "bin_num": 100,
}


def cell_folder(
    folder: Path, name: str = "aido_cell_3m", genes: Sequence[str] = GENES, **config: Any
) -> Path:
    """Random weights under published names, with a gene list; `config` overrules what is small."""
    from mgen_cell import plugin

    card = next(card for card in plugin.CARDS if card.name == name)
    small = {
        "model_type": card.load(card, card.options()).model_type,  # type: ignore[attr-defined]
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "max_position_embeddings": len(genes),
        "bin_num": 10,
    }
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**small, **config}))
    (folder / "OS_scRNA_gene_index.19264.tsv").write_text("\n".join(genes))
    backbone = card.load(card, card.options(weights=folder))
    backbone.want = Want(logits=True)
    module = backbone.build()
    drawn = seeded_checkpoint(module, 3)
    tensors = {}
    for parameter_name, parameter in module.named_parameters():
        keys = backbone.sources(parameter_name, {"bert.encoder.ln.weight": None})
        pieces = drawn.tensor(parameter_name).reshape(parameter.shape).chunk(len(keys))
        tensors.update({key: piece.clone() for key, piece in zip(keys, pieces)})
    save_file(tensors, folder / "model.safetensors")
    return folder


def h5ad_file(path: Path, cells: int, genes: Sequence[str] = GENES) -> Path:
    """An AnnData file of random counts; every seventh cell has none."""
    counts = np.random.default_rng(1).poisson(0.5, (cells, len(genes))).astype(np.float32)
    counts[6::7] = 0
    places = [np.flatnonzero(row) for row in counts]
    with h5py.File(path, "w") as file:
        matrix = file.create_group("X")
        matrix.attrs.update({"encoding-type": "csr_matrix", "encoding-version": "0.1.0"})
        matrix.attrs["shape"] = counts.shape
        matrix["indices"] = np.concatenate(places).astype(np.int32)
        matrix["data"] = np.concatenate([row[there] for row, there in zip(counts, places)])
        matrix["indptr"] = np.cumsum([0, *map(len, places)])
        for name, index in (("obs", [f"cell-{n}" for n in range(cells)]), ("var", genes)):
            table = file.create_group(name)
            table.attrs.update({"encoding-type": "dataframe", "encoding-version": "0.2.0"})
            table.attrs.update({"_index": "_index", "column-order": np.array([], dtype="S1")})
            table["_index"] = list(index)
    return path
