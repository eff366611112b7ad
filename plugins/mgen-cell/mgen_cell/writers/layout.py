"""What a column of a run is for AnnData: text, numbers, or vectors of them."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

import h5py  # type: ignore[import-untyped]
import numpy as np
import pyarrow as pa

from mgen_core import MgenError

from ..cell import Array
from .encoding import add_text, add_texts

TOKENS = "mgen.tokens"
FLOATS = (pa.float16(), pa.float32(), pa.float64())


class Layout(NamedTuple):
    """A column whose entries are of this shape, of `leaf`."""

    field: pa.Field
    leaf: pa.DataType
    shape: tuple[int, ...]

    @property
    def text(self) -> bool:
        """Whether it is of texts, or of nulls alone."""
        return not self.shape and (pa.types.is_string(self.leaf) or pa.types.is_null(self.leaf))

    def numbers(self, column: pa.ChunkedArray) -> tuple[Array, Array]:
        """(rows) bool: the entries that are not null; and those, (entries, *shape)."""
        known = column.drop_null()
        for _ in self.shape:
            known = pa.chunked_array([c.flatten() for c in known.chunks], known.type.value_type)
        return np.asarray(column.is_valid()), known.to_numpy().reshape(-1, *self.shape)


def layout_of(field: pa.Field) -> Layout:
    """Raises `MgenError` for a column that AnnData cannot hold."""
    leaf, shape = field.type, []
    while pa.types.is_fixed_size_list(leaf):
        shape.append(leaf.list_size)
        leaf = leaf.value_type
    found = Layout(field, leaf, tuple(shape))
    numbers = leaf in FLOATS or pa.types.is_integer(leaf) or pa.types.is_boolean(leaf)
    marked = (field.metadata or {}).get(b"mgen.dtype")
    if marked or not (numbers or found.text):
        raise MgenError(
            f"h5ad cannot hold the column {field.name!r} of type {field.type}",
            "choose others with --columns, or merge to .parquet",
        )
    if "/" in field.name:
        raise MgenError(
            f"h5ad cannot hold the column {field.name!r}: a slash parts names in HDF5",
            "choose others with --columns, or merge to .parquet",
        )
    return found


def told(schema: pa.Schema) -> dict[str, str]:
    """The metadata of the run."""
    return {key.decode(): value.decode() for key, value in (schema.metadata or {}).items()}


def tokens_of(schema: pa.Schema) -> list[str]:
    """Names of the tokens that each row has, where they have names."""
    return list(json.loads(told(schema).get(TOKENS, "[]")))


def tell(group: h5py.Group, schema: pa.Schema) -> None:
    """Write the metadata of the run."""
    for key, text in told(schema).items():
        name = key.removeprefix("mgen.")
        if key == TOKENS:
            add_texts(group, name, tokens_of(schema))
        else:
            add_text(group, name, text)


def nan_of(leaf: pa.DataType) -> Any:
    """The type of numbers of which one may be missing in a vector."""
    return leaf.to_pandas_dtype() if leaf in FLOATS else np.float64
