"""Options of these backbones and readers (`--option KEY=VALUE`)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mgen_core import BackboneOptions, ReaderOptions


@dataclass(frozen=True)
class ListOptions(BackboneOptions):
    """How cells are read.

    - `genes`: the model's gene list; None: the one in the folder of the weights.
    - `as_reference`: as ModelGenerator does, which rounds what AIDO.Cell reads to bfloat16, and
      lets cells of AIDO.Tissue depend on those that are computed with them.
    """

    genes: Path | None = None
    as_reference: bool = False


@dataclass(frozen=True)
class CellOptions(ListOptions):
    """`over`: the tokens that are pooled, or kept by `--pool tokens`.

    `genes`: all of the list; `present`: those that the data has, and both depth tokens; else genes
    by name.
    """

    over: tuple[str, ...] = ("genes",)


@dataclass(frozen=True)
class TissueOptions(ListOptions):
    """`use_xy`: places of cells, not of genes, say where a token is (`rope2d_use_xy`)."""

    use_xy: bool = False


@dataclass(frozen=True)
class GeneOptions(ReaderOptions):
    """`gene_col`: where the genes' names are; None: where such files usually have symbols."""

    gene_col: str | None = None


@dataclass(frozen=True)
class AnnDataOptions(GeneOptions):
    """`neighbours`: so many nearest cells come with each, by the columns `xy` of obs."""

    neighbours: int = 0
    xy: tuple[str, str] = ("x", "y")
