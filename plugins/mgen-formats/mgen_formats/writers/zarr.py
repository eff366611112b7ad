"""zarr: a group of arrays, version 3, in a zip file, written from its start to its end.

Written here and not by the library, which wants to go back in the file. An array is chunks, then
the JSON that tells its shape, which is only known at the end.
"""

from __future__ import annotations

import json
import math
import struct
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa

from mgen_core import MgenError, Writer

from .arrays import Array, Flat, flatten, metadata, rebuild, schema_of
from .intact import intact
from .kind import Kind, kind, refuse_bfloat16
from .parquet import groups

CHUNK_BYTES = 8 << 20
CHUNK_TEXTS = 1 << 16
META = "zarr.json"


class ZarrWriter(Writer):
    """Arrays by column name, streamed. Memory: a chunk a column, and nine bytes a row.

    - a fixed-size column is `NAME` (n, ...);
    - a ragged one is `NAME`, its rows end to end, and `NAME.offsets` (n + 1,): row i is
      `NAME[offsets[i]:offsets[i + 1]]`;
    - text is `NAME`, of zarr's `string`;
    - where a column has nulls, `NAME.valid` is False there, and the entry NaN, 0 or empty;
    - the schema's metadata are the group's attributes.
    """

    def write(self, file: BinaryIO, tables: Iterable[pa.Table], schema: pa.Schema) -> None:
        refuse_bfloat16(schema, self.card.name)
        kinds = [kind(field, self.card.name) for field in schema]
        _check_names(schema, kinds)
        with zipfile.ZipFile(file, "w") as archive:
            columns = [_Column(archive, field.name, of) for field, of in zip(schema, kinds)]
            # Cut anew, so that chunks come in an order that the rows alone decide.
            for table in groups(tables, schema):
                for column, values in zip(columns, table.columns):
                    column.add(flatten(values, column.kind))
            for column in columns:
                column.close()
            group = {"attributes": metadata(schema), "zarr_format": 3, "node_type": "group"}
            _put(archive, META, json.dumps(group).encode())

    def read(self, file: BinaryIO, columns: Sequence[str] | None = None) -> pa.Table:
        with intact(self.card.name), zipfile.ZipFile(file) as archive:
            schema = schema_of(json.loads(archive.read(META))["attributes"], columns)
            held = [_column(archive, field, kind(field, self.card.name)) for field in schema]
            return pa.table(held, schema=schema)


class _Column:
    """The arrays of a column on their way."""

    def __init__(self, archive: zipfile.ZipFile, name: str, of: Kind) -> None:
        self.kind = of
        self._archive, self._name = archive, name
        dtype = np.dtype(object if of.text else of.leaf.to_pandas_dtype())
        self._values = _Chunked(archive, name, dtype, of.shape)
        self._lengths: list[Array] = []
        self._valid: list[Array] = []
        self._nulls = False

    def add(self, flat: Flat) -> None:
        self._nulls = self._nulls or flat.valid is not None
        self._valid.append(np.ones(flat.rows, bool) if flat.valid is None else flat.valid)
        if self.kind.text:
            texts = [text or "" for text in flat.texts()]
            self._values.add(np.array([*texts, None], object)[:-1])
        else:
            self._values.add(flat.values)
        if self.kind.ragged and flat.lengths is not None:
            self._lengths.append(flat.lengths)

    def close(self) -> None:
        self._values.close()
        if self.kind.ragged:
            lengths = np.concatenate([np.zeros(1, np.int64), *self._lengths])
            self._whole("offsets", np.cumsum(lengths))
        if self._nulls:
            self._whole("valid", np.concatenate(self._valid))

    def _whole(self, what: str, values: Array) -> None:
        array = _Chunked(self._archive, f"{self._name}.{what}", values.dtype, ())
        array.add(values)
        array.close()


class _Chunked:
    """An array that grows along its first axis."""

    def __init__(
        self, archive: zipfile.ZipFile, name: str, dtype: np.dtype[Any], shape: tuple[int, ...]
    ) -> None:
        self._archive, self._name, self._dtype, self._shape = archive, name, dtype, shape
        entry = dtype.itemsize * math.prod(shape)
        self._most = CHUNK_TEXTS if dtype.hasobject else max(1, CHUNK_BYTES // max(entry, 1))
        self._held: list[Array] = []
        self._length = self._rows = 0
        self._chunks = 0

    def add(self, values: Array) -> None:
        self._held.append(values)
        self._length += len(values)
        self._rows += len(values)
        if self._length < self._most:
            return
        joined = np.concatenate(self._held)
        whole = len(joined) // self._most * self._most
        for start in range(0, whole, self._most):
            self._put(joined[start : start + self._most])
        self._held = [joined[whole:].copy()]
        self._length = len(joined) - whole

    def close(self) -> None:
        chunk = self._most if self._chunks else max(self._length, 1)
        if self._length:
            last = np.concatenate(self._held)
            blank = np.full((chunk - len(last), *self._shape), self._fill, self._dtype)
            self._put(np.concatenate([last, blank]))  # every chunk of an array is of one size
        text = self._dtype.hasobject
        little = {"name": "bytes", "configuration": {"endian": "little"}}
        about = {
            "shape": [self._rows, *self._shape],
            "data_type": "string" if text else self._dtype.name,
            "chunk_grid": {
                "name": "regular",
                "configuration": {"chunk_shape": [chunk, *self._shape]},
            },
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
            "fill_value": self._fill,
            "codecs": [{"name": "vlen-utf8", "configuration": {}} if text else little],
            "attributes": {},
            "zarr_format": 3,
            "node_type": "array",
            "storage_transformers": [],
        }
        _put(self._archive, f"{self._name}/{META}", json.dumps(about).encode())

    @property
    def _fill(self) -> Any:
        return "" if self._dtype.hasobject else self._dtype.type(0).item()

    def _put(self, values: Array) -> None:
        content = _packed(values) if self._dtype.hasobject else values.tobytes()
        _put(self._archive, _key(self._name, self._chunks, self._shape), content)
        self._chunks += 1


def _put(archive: zipfile.ZipFile, name: str, content: bytes) -> None:
    archive.writestr(zipfile.ZipInfo(name), content)  # not the hour of writing


def _key(name: str, chunk: int, shape: tuple[int, ...]) -> str:
    return "/".join([name, "c", str(chunk), *("0" for _ in shape)])


def _packed(texts: Array) -> bytes:
    """Codec `vlen-utf8`: how many, then length and bytes of each."""
    encoded = [text.encode() for text in texts.tolist()]
    parts = (part for text in encoded for part in (struct.pack("<I", len(text)), text))
    return struct.pack("<I", len(encoded)) + b"".join(parts)


def _unpacked(content: bytes) -> Iterator[str]:
    (count,) = struct.unpack_from("<I", content)
    at = 4
    for _ in range(count):
        (length,) = struct.unpack_from("<I", content, at)
        yield content[at + 4 : at + 4 + length].decode()
        at += 4 + length


def _column(archive: zipfile.ZipFile, field: pa.Field, of: Kind) -> pa.Array:
    names = set(archive.namelist())
    valid = f"{field.name}.valid"
    there = _array(archive, valid) if f"{valid}/{META}" in names else None
    values = _array(archive, field.name)
    if of.text:
        known = np.ones(len(values), bool) if there is None else there
        texts = [text if fine else None for text, fine in zip(values, known)]
        return pa.array(texts, field.type)
    lengths = np.diff(_array(archive, f"{field.name}.offsets")) if of.ragged else None
    return rebuild(field, of, Flat(values, lengths, there))


def _array(archive: zipfile.ZipFile, name: str) -> Any:
    about = json.loads(archive.read(f"{name}/{META}"))
    rows, *shape = about["shape"]
    chunk = about["chunk_grid"]["configuration"]["chunk_shape"][0]
    keys = [_key(name, number, tuple(shape)) for number in range(-(-rows // chunk))]
    if about["data_type"] == "string":
        return [text for key in keys for text in _unpacked(archive.read(key))][:rows]
    dtype = np.dtype(about["data_type"])
    chunks = [np.frombuffer(archive.read(key), dtype).reshape(chunk, *shape) for key in keys]
    return np.concatenate([np.zeros((0, *shape), dtype), *chunks])[:rows]


def _check_names(schema: pa.Schema, kinds: Sequence[Kind]) -> None:
    """Raise `MgenError` for columns whose arrays zarr could not name, or not tell apart."""
    taken = set()
    for field, of in zip(schema, kinds):
        name = field.name
        if not name or "/" in name or name.startswith("__") or set(name) == {"."} or name == META:
            raise MgenError(f"zarr cannot name an array {name!r}", "use --writer parquet")
        for array in (name, f"{name}.valid", *([f"{name}.offsets"] if of.ragged else [])):
            if array in taken:
                raise MgenError(f"two arrays would be named {array!r}", "use --writer parquet")
            taken.add(array)
