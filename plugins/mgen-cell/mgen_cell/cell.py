"""What a row of a count matrix is: the data of a `Row`, between these readers and backbones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray[Any, Any]


class Genes:
    """Names of the columns of a count matrix: one object for all cells of a file.

    `others` says where else names are, for an error to tell.
    """

    def __init__(self, names: Sequence[str], others: Sequence[str] = ()) -> None:
        self.names = names
        self.others = others


class Cell(NamedTuple):
    """Counts of one cell: `counts[i]` (float) belongs to `genes.names[places[i]]`.

    A gene that is left out was not seen; one that is named twice has the sum.
    """

    genes: Genes
    places: Array
    counts: Array


class Neighbourhood(NamedTuple):
    """A cell, then those around it, nearest first; `xy` (cells, 2) float64: where they are."""

    cells: tuple[Cell, ...]
    xy: Array
