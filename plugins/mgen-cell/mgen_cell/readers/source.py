"""A file of counts: opened, its tables of names read, fingerprinted."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py  # type: ignore[import-untyped]

from mgen_core import InputError, ReaderOptions, Rows, place

from ..cell import Cell, Genes
from .matrix import SOUND, Matrix

IDS = "obs_names"
COUNTS = "X"


def readable(uri: str) -> Path:
    """The path of a file that can be read. Raises `InputError` for anything else."""
    path = place(uri)
    try:
        with path.open("rb"):
            return path
    except OSError as error:
        hint = "check the path and who may read it"
        raise InputError(f"cannot read {uri}: {error.strerror}", hint) from error


def digest(path: Path) -> str:
    """SHA-256 of the file's bytes."""
    whole = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            whole.update(block)
    return whole.hexdigest()


@contextmanager
def opened(path: Path) -> Iterator[h5py.File]:
    """The HDF5 file. Raises `InputError` for anything else."""
    with path.open("rb") as file:
        try:
            found = h5py.File(file, "r")
        except OSError as error:
            hint = "unpack it if it is compressed; fetch it again if it was cut short"
            raise InputError(f"{path} is not a whole HDF5 file", hint) from error
        with found:
            yield found


def inside(node: Any, name: str, path: Path) -> Any:
    """What a group holds by a name. Raises `InputError` where it holds nothing."""
    if not isinstance(node, h5py.Group) or node.get(name) is None:
        raise InputError(f"{path} holds no {name!r}", SOUND)
    return node[name]


def values(node: Any, some: slice = slice(None)) -> list[Any]:
    """A column as AnnData or Cell Ranger stores it: texts, numbers, categories, some of them null.

    Raises `InputError` for a column that is none of these.
    """
    if isinstance(node, h5py.Dataset):
        if node.ndim != 1:
            raise InputError(f"{node.name} is no column", SOUND)
        return _plain(node, some)
    if "codes" in node and "categories" in node:
        names = values(node["categories"])
        return [names[code] if 0 <= code < len(names) else None for code in node["codes"][some]]
    if "values" in node and "mask" in node:
        pairs = zip(values(node["values"], some), node["mask"][some])
        return [None if null else value for value, null in pairs]
    raise InputError(f"{node.name} is no column", SOUND)


def _plain(node: h5py.Dataset, some: slice) -> list[Any]:
    if h5py.check_string_dtype(node.dtype) is not None:
        return list(node.asstr(errors="replace")[some])
    if node.dtype.kind not in "iufb":
        raise InputError(f"{node.name} holds neither text nor numbers", SOUND)
    found: list[Any] = node[some].tolist()
    by_code = node.attrs.get("categories")  # as AnnData wrote them before 0.8
    if not isinstance(by_code, h5py.Reference):
        return found
    names = values(node.file[by_code])
    return [names[code] if 0 <= code < len(names) else None for code in found]


def named(found: Sequence[Any]) -> list[str]:
    """Names as texts, whatever they were."""
    return [name if isinstance(name, str) else str(name) for name in found]


class CountRows(Rows):
    """The cells of one file: matrices and columns by name, each where the file has it."""

    default_id = IDS
    default_x = COUNTS

    def __init__(
        self,
        path: Path,
        matrices: Mapping[str, str],
        genes: Mapping[str, Genes],
        columns: Mapping[str, str],
        length: int,
        options: ReaderOptions,
    ) -> None:
        self.path = path
        self.options = options
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
        with opened(self.path) as file:
            first = 0
            for block in self.open(file, matrix).blocks():
                some = slice(first, first + len(block))
                cells = [Cell(self.genes[matrix], *pair) for pair in block]
                others = {n: values(file[self.places[n]], some) for n in columns if n != matrix}
                yield {matrix: cells, **others}
                first += len(block)

    def open(self, file: h5py.File, matrix: str) -> Matrix:
        """A matrix of the opened file. Raises `InputError` for one that is not sound."""
        raise NotImplementedError

    def digest(self) -> str:
        return f"{digest(self.path)} {self.options}"
