"""What a column's Arrow type holds, in the words that array formats understand."""

from __future__ import annotations

from dataclasses import dataclass

import pyarrow as pa

from mgen_core import MgenError


@dataclass(frozen=True)
class Kind:
    """Text, or numbers of one type: `shape` per entry, any number of those when ragged."""

    leaf: pa.DataType
    shape: tuple[int, ...] = ()
    ragged: bool = False
    bfloat16: bool = False

    @property
    def text(self) -> bool:
        return _is_text(self.leaf)

    def type(self) -> pa.DataType:
        """The Arrow type of a column of this kind."""
        found = self.leaf
        for size in reversed(self.shape):
            found = pa.list_(found, size)
        return pa.list_(found) if self.ragged else found


def kind(field: pa.Field, writer: str) -> Kind:
    """The kind of a column. Raises `MgenError` for a type that arrays cannot hold."""
    leaf = field.type
    ragged = pa.types.is_list(leaf)
    if ragged:
        leaf = leaf.value_type
    shape = []
    while pa.types.is_fixed_size_list(leaf):
        shape.append(leaf.list_size)
        leaf = leaf.value_type
    listed = bool(ragged or shape)
    number = pa.types.is_integer(leaf) or pa.types.is_floating(leaf) or pa.types.is_boolean(leaf)
    if not number and (listed or not _is_text(leaf)):
        what = f"{writer} cannot hold the column {field.name!r} of type {field.type}"
        raise MgenError(what, "use --writer parquet")
    return Kind(leaf, tuple(shape), ragged, is_bfloat16(field))


def _is_text(leaf: pa.DataType) -> bool:
    # A column of nulls alone is text without a value.
    return bool(pa.types.is_string(leaf) or pa.types.is_null(leaf))


def is_bfloat16(field: pa.Field) -> bool:
    """Whether a column of uint16 is marked as bfloat16, on its field or on that of its values."""
    if (field.metadata or {}).get(b"mgen.dtype") == b"bfloat16":
        return True
    listed = pa.types.is_list(field.type) or pa.types.is_fixed_size_list(field.type)
    return listed and is_bfloat16(field.type.value_field)


def refuse_bfloat16(schema: pa.Schema, writer: str) -> None:
    """Raise `MgenError` when a column is bfloat16, for formats that lack the type."""
    for field in schema:
        if is_bfloat16(field):
            what = f"{writer} cannot hold bfloat16 (column {field.name!r})"
            raise MgenError(what, "use --dtype float16 or --writer safetensors")
