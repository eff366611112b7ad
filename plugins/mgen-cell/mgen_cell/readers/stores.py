"""Where counts are: an HDF5 file, a folder of zarr, or an AnnData in memory; all read as one tree.

A node of the tree is a group (`[]`, `get`, `in`, names, `attrs`) or an array (`shape`, `dtype`,
slices): h5py's, zarr's, or those of this module.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import h5py  # type: ignore[import-untyped]
import numpy as np

from mgen_core import InputError, place

BLOCK = 1 << 20


def is_array(node: Any) -> bool:
    """Whether a node is an array, and no group."""
    return hasattr(node, "dtype")


class Store:
    """A tree that can be opened again and again; `name` is what errors call it."""

    name: str

    def opened(self) -> AbstractContextManager[Any]:
        """Its root. Raises `InputError` for what is no such tree."""
        raise NotImplementedError

    def digest(self) -> str:
        """SHA-256 of what is in it."""
        raise NotImplementedError


class HdfStore(Store):
    """An HDF5 file."""

    def __init__(self, uri: str) -> None:
        self.name = uri
        self.path = readable(uri)

    @contextmanager
    def opened(self) -> Iterator[h5py.File]:
        with self.path.open("rb") as file:
            try:
                found = h5py.File(file, "r")
            except OSError as error:
                hint = "unpack it if it is compressed; fetch it again if it was cut short"
                raise InputError(f"{self.name} is not a whole HDF5 file", hint) from error
            with found:
                yield found

    def digest(self) -> str:
        return file_digest(self.path)


class ZarrStore(Store):
    """A folder that AnnData has written with zarr, here or on an object store."""

    def __init__(self, uri: str) -> None:
        self.name = uri
        self.path = place(uri)

    @contextmanager
    def opened(self) -> Iterator[Any]:
        try:
            import zarr
        except ImportError as error:
            hint = "pip install 'mgen-cell[zarr]' (Python 3.11 and later)"
            raise InputError(f"{self.name} needs the package zarr", hint) from error
        try:
            found = zarr.open_group(str(self.path), mode="r")
            refuse_pickles(found, self.name)
        except (OSError, ValueError, KeyError) as error:
            what = f"{self.name} is no group of zarr: {error}"
            raise InputError(
                what, "an AnnData's folder is wanted, as write_zarr makes it"
            ) from error
        yield found

    def digest(self) -> str:
        whole = hashlib.sha256()
        for path in sorted(path for path in self.path.rglob("*") if path.is_file()):
            whole.update(f"{path.relative_to(self.path)} {file_digest(path)}\n".encode())
        return whole.hexdigest()


class Group(dict[str, Any]):
    """A group in memory: its nodes, or what makes them; names may be paths."""

    def __init__(self, nodes: Mapping[str, Any], **attributes: Any) -> None:
        super().__init__(nodes)
        self.attrs = attributes

    def __getitem__(self, path: str) -> Any:
        name, _, rest = path.partition("/")
        found = super().__getitem__(name)
        found = found() if callable(found) else found
        return found[rest] if rest else found

    def get(self, path: str, default: Any = None) -> Any:
        try:
            return self[path]
        except KeyError:
            return default


class HeldStore(Store):
    """An AnnData in memory; nothing of it is copied."""

    name = "the AnnData"

    def __init__(self, cells: Any) -> None:
        self.root = Group({"obs": table_of(cells.obs), "var": table_of(cells.var)})
        if cells.X is not None:
            self.root["X"] = matrix_of(cells.X)
        self.root["layers"] = Group({name: matrix_of(cells.layers[name]) for name in cells.layers})
        if cells.raw is not None:
            raw = {"X": matrix_of(cells.raw.X), "var": table_of(cells.raw.var)}
            self.root["raw"] = Group(raw)

    def opened(self) -> AbstractContextManager[Any]:
        return nullcontext(self.root)

    def digest(self) -> str:
        whole = hashlib.sha256()
        for name, node in flat(self.root):
            whole.update(f"{name}\n".encode())
            for block in blocks(node):
                whole.update(block)
        return whole.hexdigest()


def open_store(data: Any) -> Store:
    """The tree of a file, a folder, or an AnnData. Raises `InputError` for what cannot be read."""
    if not isinstance(data, str):
        return HeldStore(data)
    return ZarrStore(data) if place(data).is_dir() else HdfStore(data)


def readable(uri: str) -> Path:
    """The path of a file that can be read. Raises `InputError` for anything else."""
    path = place(uri)
    try:
        with path.open("rb"):
            return path
    except OSError as error:
        hint = "check the path and who may read it"
        raise InputError(f"cannot read {uri}: {error.strerror}", hint) from error


def file_digest(path: Path) -> str:
    """SHA-256 of the file's bytes."""
    whole = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            whole.update(block)
    return whole.hexdigest()


# --------------------------------------------------------------------------- zarr


def refuse_pickles(group: Any, name: str) -> None:
    """Raise `InputError` for an array that is stored as pickles: reading it would run them."""
    for path, array in group.members(max_depth=None):
        if not is_array(array):
            continue
        filters = getattr(array.metadata, "filters", None) or ()
        codecs = getattr(array.metadata, "codecs", None) or ()
        kinds = {str(getattr(each, "codec_id", "")) for each in filters}
        kinds |= {str(getattr(each, "codec_name", "")) for each in codecs}
        if any("pickle" in kind for kind in kinds):
            raise InputError(f"{name}: {path} holds pickles", "write it again with anndata")


# --------------------------------------------------------------------------- in memory


def table_of(frame: Any) -> Group:
    """A pandas table as AnnData stores one."""
    columns: dict[str, Callable[[], Any]] = {
        str(name): partial(column_of, frame, name) for name in frame.columns
    }
    index = "_index"
    while index in columns:
        index += "_"
    columns[index] = lambda: np.array(frame.index.astype(str), dtype=object)
    return Group(columns, _index=index)


def column_of(frame: Any, name: Any) -> Any:
    """A column: numbers as they are, anything else as objects, None where it is missing."""
    series = frame[name]
    if isinstance(series.dtype, np.dtype) and series.dtype.kind in "iufb":
        return series.to_numpy()
    missing = series.isna().to_numpy()
    return np.array(
        [None if null else value for value, null in zip(series.tolist(), missing)], dtype=object
    )


def matrix_of(matrix: Any) -> Any:
    """A matrix: dense, sparse, or still in its file."""
    if hasattr(matrix, "group"):  # of an AnnData that is backed
        return matrix.group
    if not hasattr(matrix, "indptr") and hasattr(matrix, "tocsr"):
        matrix = matrix.tocsr()
    if hasattr(matrix, "indptr"):
        parts = {name: getattr(matrix, name) for name in ("data", "indices", "indptr")}
        kind = {"encoding-type": f"{matrix.format}_matrix", "shape": matrix.shape}
        return Group(parts, **kind)
    return matrix


def flat(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """The arrays of a tree, each with its path."""
    if is_array(node):
        yield path, node
        return
    for name in sorted(node):
        yield from flat(node[name], f"{path}/{name}")


def blocks(node: Any) -> Iterator[bytes]:
    """An array's content, a block after the other."""
    step = max(1, BLOCK // max(1, int(np.prod(node.shape[1:]))))
    for first in range(0, node.shape[0], step):
        some = np.ascontiguousarray(node[first : first + step])
        yield repr(some.tolist()).encode() if some.dtype.hasobject else some.tobytes()
