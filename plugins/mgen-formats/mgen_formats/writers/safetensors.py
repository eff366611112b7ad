"""safetensors: tensors and text, no pickle."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import torch
from safetensors.torch import load

from mgen_core import Writer

from .arrays import Array, Flat, columns, gather, metadata, rebuild, schema_of
from .intact import intact
from .kind import Kind, kind
from .pt import array, optional


class SafetensorsWriter(Writer):
    """Tensors by column name, held in memory while they are written.

    - a fixed-size column is `NAME` (n, ...);
    - a ragged one is `NAME`, its rows end to end, and `NAME.offsets` (n + 1,): row i is
      `NAME[offsets[i]:offsets[i + 1]]`;
    - text is `NAME.utf8` (uint8) and `NAME.offsets`;
    - where a column has nulls, `NAME.valid` is False there, and the entry NaN, 0 or empty.
    """

    def write(self, file: BinaryIO, tables: Iterable[pa.Table], schema: pa.Schema) -> None:
        _save(file, gather(_saved(tables, schema, self.card.name)), metadata(schema))

    def read(self, file: BinaryIO) -> pa.Table:
        with intact(self.card.name):
            content = file.read()
            schema = schema_of(_header(content)["__metadata__"])
            found = load(content)
            held = [_loaded(found, field, kind(field, self.card.name)) for field in schema]
            return pa.table(held, schema=schema)


def _saved(
    tables: Iterable[pa.Table], schema: pa.Schema, writer: str
) -> Iterator[tuple[str, tuple[str, Array]]]:
    """Tensors by name, each with its type as safetensors spells it."""
    for field, of, flat in columns(tables, schema, writer):
        dtype = "BF16" if of.bfloat16 else _dtype(flat.values)
        yield f"{field.name}.utf8" if of.text else field.name, (dtype, flat.values)
        if flat.lengths is not None:
            yield f"{field.name}.offsets", ("I64", flat.offsets)
        if flat.valid is not None:
            yield f"{field.name}.valid", ("BOOL", flat.valid)


def _dtype(values: Array) -> str:
    if values.dtype == bool:
        return "BOOL"
    return {"f": "F", "i": "I", "u": "U"}[values.dtype.kind] + str(8 * values.itemsize)


def _save(file: BinaryIO, found: Mapping[str, tuple[str, Array]], about: dict[str, str]) -> None:
    # The library's own function takes a path, and writes the metadata in random order. The format
    # is a length, a JSON header, the bytes.
    header: dict[str, Any] = {"__metadata__": about}
    start = 0
    ordered = sorted(found.items(), key=lambda item: -item[1][1].itemsize)  # keeps all aligned
    for name, (dtype, values) in ordered:
        stop = start + values.nbytes
        header[name] = {"dtype": dtype, "shape": values.shape, "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for _, (_, values) in ordered:
        file.write(np.ascontiguousarray(values).data)


def _header(content: bytes) -> dict[str, Any]:
    length = int.from_bytes(content[:8], "little")
    found: dict[str, Any] = json.loads(content[8 : 8 + length])
    return found


def _loaded(found: Mapping[str, torch.Tensor], field: pa.Field, of: Kind) -> pa.Array:
    values = found[f"{field.name}.utf8" if of.text else field.name]
    offsets = optional(found, f"{field.name}.offsets")
    lengths = None if offsets is None else np.diff(offsets)
    valid = optional(found, f"{field.name}.valid")
    return rebuild(field, of, Flat(array(values, of), lengths, valid))
