"""Tables of names beside counts, and cells by what is in the trees of `stores`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import h5py  # type: ignore[import-untyped]

from mgen_core import InputError, Rows

from ..cell import Cell, Genes
from .matrix import SOUND, Matrix
from .stores import Store, is_array

IDS = "obs_names"
COUNTS = "X"


def inside(node: Any, name: str, where: str) -> Any:
    """What a group holds by a name. Raises `InputError` where it holds nothing."""
    if is_array(node) or node.get(name) is None:
        raise InputError(f"{where} holds no {name!r}", SOUND)
    return node[name]


def values(node: Any, some: slice = slice(None)) -> list[Any]:
    """A column as AnnData or Cell Ranger stores it: texts, numbers, categories, some of them null.

    Raises `InputError` for a column that is none of these.
    """
    if is_array(node):
        if len(node.shape) != 1:
            raise InputError(f"{_name(node)} is no column", SOUND)
        return _plain(node, some)
    if "codes" in node and "categories" in node:
        names = values(node["categories"])
        return [names[code] if 0 <= code < len(names) else None for code in node["codes"][some]]
    if "values" in node and "mask" in node:
        pairs = zip(values(node["values"], some), node["mask"][some])
        return [None if null else value for value, null in pairs]
    raise InputError(f"{_name(node)} is no column", SOUND)


def _name(node: Any) -> str:
    return str(getattr(node, "name", "a column"))


def _plain(node: Any, some: slice) -> list[Any]:
    if isinstance(node, h5py.Dataset) and h5py.check_string_dtype(node.dtype) is not None:
        return list(node.asstr(errors="replace")[some])
    found: list[Any] = node[some].tolist()
    if node.dtype.kind in "OTU" and not isinstance(node, h5py.Dataset):  # texts of zarr, objects
        return found
    if node.dtype.kind not in "iufb":
        raise InputError(f"{_name(node)} holds neither text nor numbers", SOUND)
    by_code = getattr(node, "attrs", {}).get("categories")  # as AnnData wrote them before 0.8
    if not isinstance(by_code, h5py.Reference):
        return found
    names = values(node.file[by_code])
    return [names[code] if 0 <= code < len(names) else None for code in found]


def named(found: Sequence[Any]) -> list[str]:
    """Names as texts, whatever they were."""
    return [name if isinstance(name, str) else str(name) for name in found]


class CountRows(Rows):
    """The cells of one store: matrices and columns by name, each where the store has it."""

    default_id = IDS
    default_x = COUNTS

    def __init__(
        self,
        store: Store,
        matrices: Mapping[str, str],
        genes: Mapping[str, Genes],
        columns: Mapping[str, str],
        length: int,
    ) -> None:
        self.store = store
        self.matrices = matrices
        self.genes = genes
        self.places = columns
        self.columns = [*matrices, *columns]
        self.length: int = length

    def chunks(self, columns: Sequence[str]) -> Iterator[Mapping[str, Sequence[Any]]]:
        asked = [name for name in columns if name in self.matrices]
        if len(asked) != 1:
            raise InputError(
                f"{', '.join(columns)}: {len(asked)} matrices",
                f"--x-col {' or '.join(self.matrices)}",
            )
        matrix = asked[0]
        with self.store.opened() as root:
            first = 0
            for block in self.open(root, matrix).blocks():
                some = slice(first, first + len(block))
                cells = [Cell(self.genes[matrix], *pair) for pair in block]
                others = {n: values(root[self.places[n]], some) for n in columns if n != matrix}
                yield {matrix: cells, **others}
                first += len(block)

    def open(self, root: Any, matrix: str) -> Matrix:
        """A matrix of the opened store. Raises `InputError` for one that is not sound."""
        raise NotImplementedError

    def digest(self) -> str:
        return self.store.digest()
