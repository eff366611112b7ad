"""How AnnData lays out groups, arrays and texts in HDF5."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import h5py  # type: ignore[import-untyped]
import numpy as np

ROWS = 1024  # of a chunk
TEXT = h5py.string_dtype()


def encode(node: Any, kind: str, version: str) -> Any:
    """Say what a node is."""
    node.attrs["encoding-type"] = kind
    node.attrs["encoding-version"] = version
    return node


def add_group(found: h5py.Group, name: str, kind: str = "dict", version: str = "0.1.0") -> Any:
    """A new group."""
    return encode(found.create_group(name), kind, version)


def add_array(found: h5py.Group, name: str, **more: Any) -> Any:
    """A new array of numbers."""
    return encode(found.create_dataset(name, **more), "array", "0.2.0")


def add_growing(found: h5py.Group, name: str, shape: Sequence[int], kind: Any, **more: Any) -> None:
    """A new array without rows, of entries of this shape, to which rows are appended."""
    sizes = {"shape": (0, *shape), "maxshape": (None, *shape), "chunks": (ROWS, *shape)}
    add_array(found, name, dtype=kind, **sizes, **more)


def add_texts(found: h5py.Group, name: str, texts: Sequence[str]) -> None:
    """A new array of texts, to which more can be appended."""
    node = found.create_dataset(name, (len(texts),), TEXT, maxshape=(None,), chunks=(ROWS,))
    if texts:
        node[:] = texts
    encode(node, "string-array", "0.2.0")


def add_text(found: h5py.Group, name: str, text: str) -> None:
    """A new text."""
    encode(found.create_dataset(name, data=text, dtype=TEXT), "string", "0.2.0")


def add_categories(
    found: h5py.Group, name: str, codes: np.ndarray[Any, Any], texts: Sequence[str]
) -> None:
    """A new column of texts; the code of one that is missing is -1."""
    group = add_group(found, name, "categorical", "0.2.0")
    group.attrs["ordered"] = False
    add_array(group, "codes", data=codes)
    add_texts(group, "categories", texts)


def append(node: Any, first: int, values: np.ndarray[Any, Any]) -> None:
    """Rows from `first` on, which is where the array ends."""
    node.resize(first + len(values), axis=0)
    node[first:] = values
