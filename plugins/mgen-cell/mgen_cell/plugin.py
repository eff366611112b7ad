"""Cards of GenBio's cell models and of files of counts: nothing heavy is imported here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from mgen_core import (
    Backbone,
    BackboneCard,
    Reader,
    ReaderCard,
    ReaderOptions,
    Writer,
    WriterCard,
    hookimpl,
)

from .options import AnnDataOptions, CellOptions, GeneOptions, TissueOptions

GENBIO = "GenBio AI Community License (see the model card)"


def load_cell(card: BackboneCard, options: CellOptions) -> Backbone:
    """AIDO.Cell."""
    from .backbone import CellBackbone

    return CellBackbone(card, options)


def load_tissue(card: BackboneCard, options: TissueOptions) -> Backbone:
    """AIDO.Tissue."""
    from .tissue import TissueBackbone

    return TissueBackbone(card, options)


def _cell(name: str, width: int | None, millions: int, model: str) -> BackboneCard:
    return BackboneCard(
        name=name,
        summary="Encoder of cells, a token for each of 19,264 human genes",
        modality="cell",
        load=load_cell,
        width=width,
        licence=GENBIO,
        weights=(f"genbio-ai/{model}",),
        parameters=millions * 10**6,
        options=CellOptions,
    )


def _tissue(name: str, width: int | None, millions: int, model: str) -> BackboneCard:
    return replace(
        _cell(name, width, millions, model),
        summary="Encoder of cells among their neighbours, a token for each gene that is seen",
        load=load_tissue,
        options=TissueOptions,
    )


CARDS = (
    _cell("aido_cell_3m", 128, 4, "AIDO.Cell-3M"),
    _cell("aido_cell_10m", 256, 11, "AIDO.Cell-10M"),
    _cell("aido_cell_100m", 640, 99, "AIDO.Cell-100M"),
    _cell("aido_cell_650m", 1280, 651, "AIDO.Cell-650M"),
    _tissue("aido_tissue_3m", 128, 3, "AIDO.Tissue-3M"),
    _tissue("aido_tissue_60m", None, 60, "AIDO.Tissue-60M"),
)


def _h5ad(card: ReaderCard, options: AnnDataOptions) -> Reader:
    from .readers.anndata import AnnDataReader

    return AnnDataReader(card, options)


def _is_anndata(data: Any) -> bool:
    kind = type(data)  # anndata itself is slow to import, and may not be there
    return kind.__name__ == "AnnData" and kind.__module__.partition(".")[0] == "anndata"


def _tenx(card: ReaderCard, options: GeneOptions) -> Reader:
    from .readers.tenx import TenXReader

    return TenXReader(card, options)


def _counts(card: ReaderCard, options: ReaderOptions) -> Reader:
    from .readers.counts import CountsReader

    return CountsReader(card, options)


READERS = (
    ReaderCard(
        "h5ad",
        "AnnData: a file, a folder of zarr, or an object in memory; streamed",
        _h5ad,
        suffixes=(".h5ad", ".zarr"),
        takes=_is_anndata,
        options=AnnDataOptions,
    ),
    ReaderCard("10x", "10x Genomics HDF5", _tenx, suffixes=(".h5",), options=GeneOptions),
    # csv is a format of sequences, too: this one is asked for by name.
    ReaderCard("counts", "csv or tsv of counts: a line a cell, a column a gene", _counts),
)


def _write_h5ad(card: WriterCard) -> Writer:
    from .writers.anndata import AnnDataWriter

    return AnnDataWriter(card)


WRITERS = (WriterCard("h5ad", ".h5ad", "AnnData, vectors in obsm", _write_h5ad, into=True),)


@hookimpl
def mgen_backbones() -> Sequence[BackboneCard]:
    """The backbones of cells that ModelGenerator names."""
    return CARDS


@hookimpl
def mgen_readers() -> Sequence[ReaderCard]:
    """Files of counts."""
    return READERS


@hookimpl
def mgen_writers() -> Sequence[WriterCard]:
    """AnnData."""
    return WRITERS
