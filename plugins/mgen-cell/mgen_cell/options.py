"""Options of these backbones and readers (`--option KEY=VALUE`)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mgen_core import BackboneOptions, ReaderOptions


@dataclass(frozen=True)
class CellOptions(BackboneOptions):
    """How cells are read and pooled.

    - `genes`: the model's gene list; None: the one in the folder of the weights.
    - `over`: the tokens that are pooled, or kept by `--pool tokens`. `genes`: all of the list;
      `present`: those that the data has, and both depth tokens; else genes by name.
    - `as_reference`: round the input to bfloat16, as ModelGenerator does.
    """

    genes: Path | None = None
    over: tuple[str, ...] = ("genes",)
    as_reference: bool = False


@dataclass(frozen=True)
class GeneOptions(ReaderOptions):
    """`gene_col`: where the genes' names are; None: where such files usually have symbols."""

    gene_col: str | None = None
