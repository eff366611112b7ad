"""Count matrices in a tree, streamed row by row: CSR, CSC and dense.

A stream gives blocks: of each of so many following rows the places and the numbers that are not
left out. What a file says of itself is checked before it is used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from mgen_core import InputError

from ..cell import Array
from .stores import is_array

BLOCK = 1 << 22  # numbers that are held at once
MOST_GENES = 1 << 20
MOST_ROWS = 4096
SOUND = "the file is damaged, or was not written by AnnData or Cell Ranger"

Sparse = tuple[Array, Array]
Block = list[Sparse]


class Matrix(NamedTuple):
    """A matrix (rows, genes): `kind` says how `node` holds it ("csr", "csc" or "dense")."""

    node: Any
    kind: str
    rows: int
    genes: int

    def blocks(self) -> Iterator[Block]:
        """All rows, in order. Raises `InputError` for a matrix that is not sound."""
        return {"csr": _by_rows, "csc": _by_columns, "dense": _dense}[self.kind](self)


def open_matrix(node: Any, where: str) -> Matrix:
    """The matrix that AnnData has written at a node. Raises `InputError` for anything else."""
    if is_array(node):
        if len(node.shape) != 2:
            raise InputError(f"{where} has {len(node.shape)} dimensions, not 2", SOUND)
        return checked(Matrix(node, "dense", *map(int, node.shape)), [node], where)
    encoding = str(node.attrs.get("encoding-type", node.attrs.get("h5sparse_format", "")))
    kind = encoding.removesuffix("_matrix")
    shape = node.attrs.get("shape", node.attrs.get("h5sparse_shape", ()))
    if kind not in ("csr", "csc") or len(shape) != 2:
        raise InputError(f"{where} is stored as {encoding or 'a group'!r:.40}", SOUND)
    return sparse(node, kind, int(shape[0]), int(shape[1]), where)


def sparse(node: Any, kind: str, rows: int, genes: int, where: str) -> Matrix:
    """A sparse matrix of `data`, `indices` and `indptr`. Raises `InputError` for anything else."""
    parts = [node[name] for name in ("data", "indices", "indptr") if name in node]
    if len(parts) < 3 or not all(map(is_array, parts)):
        raise InputError(f"{where} lacks data, indices or indptr", SOUND)
    data, indices, ends = parts
    lines = rows if kind == "csr" else genes
    if data.shape != indices.shape or len(data.shape) != 1 or ends.shape != (lines + 1,):
        raise InputError(f"{where}: its parts do not fit each other", SOUND)
    return checked(Matrix(node, kind, rows, genes), parts, where)


def checked(matrix: Matrix, parts: list[Any], where: str) -> Matrix:
    """The matrix, of numbers and not too wide. Raises `InputError`."""
    if matrix.genes > MOST_GENES:
        raise InputError(f"{where} has {matrix.genes:,} columns", "no model knows so many genes")
    if any(part.dtype.kind not in "iufb" for part in parts):
        raise InputError(f"{where} does not hold numbers", SOUND)
    return matrix


def _spans(sizes: Array, numbers: int, lines: int) -> Iterator[tuple[int, int]]:
    """Following lines, at most so many, with at most so many numbers; at least one."""
    ends = np.cumsum(sizes)
    first = 0
    while first < len(sizes):
        before = ends[first - 1] if first else 0
        last = int(np.searchsorted(ends, before + numbers, side="right"))
        last = min(max(last, first + 1), first + lines)
        yield first, last
        first = last


def _line_ends(matrix: Matrix) -> Array:
    """`indptr` (lines + 1) int64, checked."""
    ends = np.asarray(matrix.node["indptr"][:], dtype=np.int64)
    if ends[0] != 0 or (np.diff(ends) < 0).any() or ends[-1] != matrix.node["data"].shape[0]:
        raise InputError("indptr does not fit the data of a sparse matrix", SOUND)
    return ends


def _places(matrix: Matrix, first: int, last: int, below: int) -> Array:
    """`indices` of a range, checked."""
    found = matrix.node["indices"][first:last]
    if len(found) and not 0 <= found.min() <= found.max() < below:
        raise InputError("a sparse matrix has an index outside of its shape", SOUND)
    return np.asarray(found)


def _by_rows(matrix: Matrix) -> Iterator[Block]:
    ends = _line_ends(matrix)
    for first, last in _spans(np.diff(ends), BLOCK, MOST_ROWS):
        start, stop = int(ends[first]), int(ends[last])
        places = _places(matrix, start, stop, matrix.genes)
        numbers = matrix.node["data"][start:stop]
        cuts = ends[first + 1 : last] - start
        yield list(zip(np.split(places, cuts), np.split(numbers, cuts)))


def one_row(matrix: Matrix) -> Callable[[int], Sparse]:
    """What reads a row by its number: of a matrix that is CSR or dense."""
    if matrix.kind == "dense":

        def dense_row(number: int) -> Sparse:
            row = matrix.node[number]
            return (places := np.flatnonzero(row), row[places])

        return dense_row
    ends = _line_ends(matrix)

    def sparse_row(number: int) -> Sparse:
        start, stop = int(ends[number]), int(ends[number + 1])
        return _places(matrix, start, stop, matrix.genes), matrix.node["data"][start:stop]

    return sparse_row


def _by_columns(matrix: Matrix) -> Iterator[Block]:
    """A matrix of columns is read once for each `4 * BLOCK` numbers in it: no copy is made."""
    ends = _line_ends(matrix)
    sizes = np.zeros(matrix.rows, dtype=np.int64)
    for start in range(0, int(ends[-1]), BLOCK):
        rows = _places(matrix, start, start + BLOCK, matrix.rows)
        sizes += np.bincount(rows, minlength=matrix.rows)
    for span in _spans(sizes, 4 * BLOCK, len(sizes)):
        yield from _gathered(matrix, ends, *span)


def _gathered(matrix: Matrix, ends: Array, first: int, last: int) -> Iterator[Block]:
    """Some rows of a matrix that is stored by columns."""
    found: list[tuple[Array, Array, Array]] = []
    for start in range(0, max(1, int(ends[-1])), BLOCK):
        rows = _places(matrix, start, start + BLOCK, matrix.rows)
        wanted = np.flatnonzero((rows >= first) & (rows < last))
        columns = np.searchsorted(ends, start + wanted, side="right") - 1
        numbers = matrix.node["data"][start : start + BLOCK][wanted]
        found.append((rows[wanted], columns.astype(np.int32), numbers))
    rows, columns, numbers = (np.concatenate(part) for part in zip(*found))
    order = np.argsort(rows, kind="stable")
    rows, columns, numbers = rows[order], columns[order], numbers[order]
    starts = np.searchsorted(rows, np.arange(first, last + 1))
    for low in range(first, last, MOST_ROWS):
        cut = starts[low - first : min(low + MOST_ROWS, last) - first + 1]
        pairs = pairwise(cut)
        yield [(columns[start:stop], numbers[start:stop]) for start, stop in pairs]


def _dense(matrix: Matrix) -> Iterator[Block]:
    step = max(1, BLOCK // max(1, matrix.genes))
    height = (getattr(matrix.node, "chunks", None) or (1,))[0]
    if height <= 4 * step:  # whole chunks, so that none is unpacked twice
        step = -(-step // height) * height
    for first in range(0, matrix.rows, step):
        block = np.asarray(matrix.node[first : first + step])
        yield [(places := np.flatnonzero(row), row[places]) for row in block]
