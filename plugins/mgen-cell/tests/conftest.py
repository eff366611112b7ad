"""Small models in the published layout, files of counts, and models filled as the core does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from cells import cell_folder
from mgen_cell import plugin

from mgen_core import Activations, Backbone, Row, Want
from mgen_core.checkpoint import open_checkpoint
from mgen_core.weights import fill, parameters_on_meta

CARDS = {card.name: card for card in plugin.CARDS}


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    torch.set_num_threads(1)


@dataclass
class Model:
    """A backbone with its filled module."""

    backbone: Backbone
    module: torch.nn.Module

    def run(self, inputs: Any) -> Activations:
        want = Want(tuple(range((self.backbone.depth or 0) + 1)), logits=True)
        with torch.inference_mode():
            return self.backbone.forward(self.module, inputs, want)

    def __call__(self, rows: Sequence[Row]) -> Activations:
        return self.run(self.backbone.collate([self.backbone.prepare(row) for row in rows]))


Open = Callable[..., Model]


@pytest.fixture
def open_model() -> Open:
    """`open_model(weights, name="aido_cell_3m", **options)`."""

    def opened(weights: Path, name: str = "aido_cell_3m", **options: Any) -> Model:
        card = CARDS[name]
        backbone = card.load(card, card.options(weights=weights, **options))
        backbone.want = Want(logits=True)
        with parameters_on_meta():
            module = backbone.build()
        checkpoint = open_checkpoint(weights)
        fill(module, backbone, checkpoint, dtype=torch.float32, device=torch.device("cpu"))
        return Model(backbone, module)

    return opened


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cell_folder(tmp_path_factory.mktemp("cell"), "aido_cell_3m")


@pytest.fixture(scope="session")
def tissue_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cell_folder(tmp_path_factory.mktemp("tissue"), "aido_tissue_3m")


def written_sparse(group: h5py.Group, counts: np.ndarray[Any, Any], kind: str) -> None:
    """A matrix as scipy and AnnData store it."""
    lines = counts if kind == "csr" else counts.T
    group.attrs["encoding-type"] = f"{kind}_matrix"
    group.attrs["shape"] = counts.shape
    group["indices"] = np.concatenate([np.flatnonzero(line) for line in lines]).astype(np.int32)
    group["data"] = np.concatenate([line[line != 0] for line in lines])
    group["indptr"] = np.concatenate(([0], np.cumsum([(line != 0).sum() for line in lines])))


@pytest.fixture(scope="session")
def write_sparse() -> Callable[[h5py.Group, Any, str], None]:
    return written_sparse


def write_table(group: h5py.Group, index: Sequence[str], **columns: Sequence[Any]) -> None:
    """A table as AnnData stores it."""
    group.attrs["_index"] = "_index"
    group["_index"] = [str(name) for name in index]
    for name, column in columns.items():
        group[name] = column


@pytest.fixture
def h5ad(tmp_path: Path) -> Callable[..., Path]:
    """`h5ad(counts, genes, kind="csr", ids=None, **columns of var)`: an AnnData file's path."""

    def written(
        counts: Any,
        genes: Sequence[str],
        kind: str = "csr",
        ids: Sequence[str] | None = None,
        **var: Sequence[Any],
    ) -> Path:
        path = tmp_path / f"{kind}.h5ad"
        counts = np.asarray(counts, dtype=np.float32)
        with h5py.File(path, "w") as file:
            if kind == "dense":
                file["X"] = counts
            else:
                written_sparse(file.create_group("X"), counts, kind)
            written_sparse(file.create_group("layers/doubled"), counts * 2, "csr")
            write_table(file.create_group("var"), genes, **var)
            write_table(file.create_group("obs"), ids or [f"cell-{n}" for n in range(len(counts))])
            file["obs/x"], file["obs/y"] = np.arange(len(counts)) ** 2, np.zeros(len(counts))
            kinds = file.create_group("obs/kind")
            kinds["categories"] = ["B", "T"]
            kinds["codes"] = np.arange(len(counts), dtype=np.int8) % 3 - 1
        return path

    return written
