"""safetensors: tensors and text, no pickle."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa

from mgen_core import Writer

from .arrays import Array, Flat, columns, gather, metadata, rebuild, schema_of
from .intact import intact
from .kind import Kind, kind

DTYPES = {
    "BOOL": np.dtype(np.bool_),
    **{f"I{8 * size}": np.dtype(f"<i{size}") for size in (1, 2, 4, 8)},
    **{f"U{8 * size}": np.dtype(f"<u{size}") for size in (1, 2, 4, 8)},
    **{f"F{8 * size}": np.dtype(f"<f{size}") for size in (2, 4, 8)},
    "BF16": np.dtype(np.uint16),
}
"""Of NumPy, by the format's own names; bfloat16 as its bits."""


class SafetensorsWriter(Writer):
    """Tensors by column name, streamed through temporary files.

    - a fixed-size column is `NAME` (n, ...);
    - a ragged one is `NAME`, its rows end to end, and `NAME.offsets` (n + 1,): row i is
      `NAME[offsets[i]:offsets[i + 1]]`;
    - text is `NAME.utf8` (uint8) and `NAME.offsets`;
    - where a column has nulls, `NAME.valid` is False there, and the entry NaN, 0 or empty.
    """

    spools = True

    def write(self, file: BinaryIO, tables: Iterable[pa.Table], schema: pa.Schema) -> None:
        with columns(tables, schema, self) as spooled:
            _save(file, gather(_saved(spooled)), metadata(schema))

    def read(self, file: BinaryIO, columns: Sequence[str] | None = None) -> pa.Table:
        with intact(self.card.name):
            content = memoryview(file.read())
            header, start = _header(content)
            schema = schema_of(header["__metadata__"], columns)

            def found(name: str) -> Array | None:
                return _array(content[start:], header[name]) if name in header else None

            held = [_loaded(found, field, kind(field, self.card.name)) for field in schema]
            return pa.table(held, schema=schema)


def _saved(
    spooled: Iterable[tuple[pa.Field, Kind, Flat]],
) -> Iterator[tuple[str, tuple[str, Array]]]:
    """Tensors by name, each with its type as safetensors spells it."""
    for field, of, flat in spooled:
        dtype = "BF16" if of.bfloat16 else _dtype(flat.values)
        yield f"{field.name}.utf8" if of.text else field.name, (dtype, flat.values)
        if flat.lengths is not None:
            yield f"{field.name}.offsets", ("I64", flat.offsets)
        if flat.valid is not None:
            yield f"{field.name}.valid", ("BOOL", flat.valid)


def _dtype(values: Array) -> str:
    return next(name for name, dtype in DTYPES.items() if values.dtype == dtype)


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


def _header(content: memoryview) -> tuple[dict[str, Any], int]:
    """The JSON header, and where the tensors begin."""
    start = 8 + int.from_bytes(content[:8], "little")
    return json.loads(bytes(content[8:start])), start


def _array(content: memoryview, about: dict[str, Any]) -> Array:
    begin, end = about["data_offsets"]
    return np.frombuffer(content[begin:end], DTYPES[about["dtype"]]).reshape(about["shape"])


def _loaded(found: Callable[[str], Array | None], field: pa.Field, of: Kind) -> pa.Array:
    values = found(f"{field.name}.utf8" if of.text else field.name)
    assert values is not None
    offsets = found(f"{field.name}.offsets") if of.text or of.ragged else None
    lengths = None if offsets is None else np.diff(offsets)
    return rebuild(field, of, Flat(values, lengths, found(f"{field.name}.valid")))
