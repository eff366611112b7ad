"""Models built and filled as the core does it, from folders in the published layout."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from mgen_aido import plugin
from safetensors.torch import save_file

from mgen_core import Activations, Backbone, Row, Want
from mgen_core.checkpoint import open_checkpoint, seeded_checkpoint
from mgen_core.dense import quicken
from mgen_core.weights import fill, parameters_on_meta

CARDS = {card.name: card for card in plugin.CARDS}
# Cards without sizes of their own: whatever config.json says goes.
CARD_OF = {"rnabert": "aido_dna_dummy", "fm4bio": "aido_protein_dummy"}


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    torch.set_num_threads(1)


@dataclass
class Model:
    """A backbone with its filled module."""

    backbone: Backbone
    module: torch.nn.Module

    @property
    def everything(self) -> Want:
        head = getattr(self.module, "head", None)
        return Want(tuple(range((self.backbone.depth or 0) + 1)), head is not None)

    def run(self, inputs: Any, want: Want | None = None) -> Activations:
        with torch.inference_mode():
            return self.backbone.forward(self.module, inputs, want or self.everything)

    def __call__(self, rows: list[Row], want: Want | None = None) -> Activations:
        return self.run(self.backbone.collate(rows), want)


Open = Callable[..., Model]


@pytest.fixture
def open_model() -> Open:
    """`open_model(card name, weights=None, logits=True, dtype=float32, **options)`."""

    def opened(
        name: str,
        weights: Path | None = None,
        logits: bool = True,
        dtype: torch.dtype = torch.float32,
        **options: Any,
    ) -> Model:
        card = CARDS[name]
        backbone = card.load(card, card.options(weights=weights, **options))
        backbone.want = Want(logits=logits)
        with parameters_on_meta():
            module = backbone.build()
        checkpoint = open_checkpoint(weights) if weights else seeded_checkpoint(module, card.seed)
        fill(module, backbone, checkpoint, dtype=dtype, device=torch.device("cpu"))
        if not backbone.plain:
            quicken(module)
        return Model(backbone, module)

    return opened


@pytest.fixture
def published(tmp_path: Path, open_model: Open) -> Callable[..., Path]:
    """`published(model type, **config fields)`: a folder with random weights in published names."""

    def folder(model_type: str, **fields: Any) -> Path:
        path = tmp_path / "-".join([model_type, *map(str, fields.values())])
        path.mkdir()
        small = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
        config = {"model_type": model_type, **small, "intermediate_size": 40, **fields}
        (path / "config.json").write_text(json.dumps(config))
        rag = fields.get("position_embedding_type") == "rope_2d"
        card = CARDS["aido_protein_rag_3b" if rag else CARD_OF[model_type]]
        backbone = card.load(card, card.options(weights=path))
        backbone.want = Want(logits=True)
        module = backbone.build()
        values = seeded_checkpoint(module, 1)
        tensors = {}
        for name, parameter in module.named_parameters():
            keys = backbone.sources(name, {"bert.encoder.ln.weight": None})
            pieces = values.tensor(name).reshape(-1).chunk(len(keys))
            shape = parameter.shape if len(keys) == 1 else parameter.shape[1:]
            tensors.update({key: piece.reshape(shape) for key, piece in zip(keys, pieces)})
        save_file(
            {key: tensor.clone() for key, tensor in tensors.items()}, path / "model.safetensors"
        )
        return path

    return folder


def rows_of(*sequences: str) -> list[Row]:
    """Rows as a reader would give them."""
    return [Row(number, str(number), sequence) for number, sequence in enumerate(sequences)]


@pytest.fixture
def rows() -> Callable[..., list[Row]]:
    return rows_of
