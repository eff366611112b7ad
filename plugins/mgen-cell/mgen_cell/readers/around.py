"""The cells around each cell of a tissue, by where they are."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np
from scipy.spatial import KDTree  # type: ignore[import-untyped]

from mgen_core import InputError

from ..cell import Array
from .matrix import Matrix, Sparse, one_row

HELD = 4096  # cells in memory: neighbours in the tissue are seldom neighbours in the file


def nearest(xy: Array, count: int) -> Array:
    """(cells, count) int: the nearest others of each, nearest first; `xy` is (cells, 2).

    Raises `InputError` where there are not so many, or it is not known where a cell is.
    """
    if count >= len(xy):
        raise InputError(f"{count:,} neighbours, in {len(xy):,} cells", "give fewer")
    if not np.isfinite(xy).all():
        row = int(np.flatnonzero(~np.isfinite(xy).all(axis=1))[0])
        raise InputError(f"it is not known where cell {row:,} is", "leave such cells out")
    _, found = KDTree(xy).query(xy, count + 1)
    others = found != np.arange(len(xy))[:, None]
    others[others.all(axis=1), -1] = False  # so many in one place that it is not among them
    return np.asarray(found[others].reshape(len(xy), count))


def by_number(matrix: Matrix) -> Callable[[int], Sparse]:
    """Rows of an open matrix by number. Raises `InputError` for one that is stored by columns."""
    if matrix.kind == "csc":
        hint = "write it with X = X.tocsr()"
        raise InputError("neighbours need a matrix that is stored by cells, not by genes", hint)
    return lru_cache(HELD)(one_row(matrix))
