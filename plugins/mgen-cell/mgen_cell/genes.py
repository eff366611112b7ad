"""The model's gene list, and counts of any other genes put into its order."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from mgen_core import InputError, WeightsError

from .cell import Array, Cell, Genes
from .geometry import GENES

FILE = "OS_scRNA_gene_index.19264.tsv"
NAMES_SHA256 = "6037e1bc9b3b48a5112ffdc29261383f747a3c3f8b568a8899b0c69d13565df8"
WHERE = (
    f"put {FILE} into the folder of the weights or give --option genes=PATH; it is in the source "
    "of GenBio's aido-cell package and of scFoundation, on GitHub"
)


def find_list(genes: Path | None, weights: Path | None) -> Path:
    """The file with the gene list. Raises `WeightsError` where there is none."""
    if genes is not None:
        return genes
    folder = weights if weights is None or weights.is_dir() else weights.parent
    if folder is None or not (folder / FILE).is_file():
        place = f" in {folder}" if folder else ""
        raise WeightsError(f"the model's gene list is needed, and is not{place}", WHERE)
    return folder / FILE


def read_list(path: Path, length: int) -> tuple[str, ...]:
    """The genes in the model's order, from a table with `gene_name` or one name a line.

    Raises `WeightsError` for another list than the model's: one of another length, or the 19,264
    genes in another order.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise WeightsError(f"cannot read the gene list {path}: {reason}", WHERE) from error
    names = tuple(line.split("\t")[0].strip() for line in lines if line.strip())
    if names[:1] == ("gene_name",):
        names = names[1:]
    if len(names) != length or len(set(names)) != length:
        raise WeightsError(
            f"{path} lists {len(set(names)):,} different genes, the model has {length:,}", WHERE
        )
    if length == GENES and hashlib.sha256("\n".join(names).encode()).hexdigest() != NAMES_SHA256:
        raise WeightsError(f"{path} lists other genes than the model's, or in other order", WHERE)
    return names


class Aligned:
    """Where each gene of a file is in the model's list.

    - `places` (genes of the file) int64: -1 for one that is not in the list, or again;
    - `present` (genes of the list) bool: those that the file has.
    """

    def __init__(self, genes: Genes, listed: Sequence[str]) -> None:
        number = {name: place for place, name in enumerate(listed)}
        self.places = np.full(len(genes.names), -1, dtype=np.int64)
        self.present = np.zeros(len(listed), dtype=bool)
        self.twice = 0
        for column, name in enumerate(genes.names):
            place = number.get(name, -1)
            if place >= 0 and self.present[place]:
                self.twice += 1
            elif place >= 0:
                self.places[column] = place
                self.present[place] = True
        if not self.present.any():
            raise _no_gene(genes, listed)

    @cached_property
    def note(self) -> str | None:
        """What does not fit, in words."""
        unknown = int((self.places < 0).sum()) - self.twice
        counts = {
            "genes of the model that the data lacks are taken as 0": int((~self.present).sum()),
            "genes that the model does not know are left out": unknown,
            "genes named again are left out": self.twice,
        }
        return "; ".join(f"{n:,} {what}" for what, n in counts.items() if n) or None

    def counts(self, cell: Cell) -> tuple[Array, Array]:
        """Places in the list and counts (float32) of the genes that are in it."""
        places = self.places[cell.places]
        known = places >= 0
        return places[known].astype(np.int32), cell.counts[known].astype(np.float32)


def _no_gene(genes: Genes, listed: Sequence[str]) -> InputError:
    first = ", ".join(map(repr, genes.names[:3]))
    others = f" (there are: {', '.join(genes.others[:20])})" if genes.others else ""
    return InputError(
        f"none of the data's {len(genes.names):,} genes ({first}, ...) is one of the model's "
        f"({', '.join(map(repr, listed[:3]))}, ...)",
        f"symbols of human genes are wanted: name their column with --option gene_col={others}",
    )
