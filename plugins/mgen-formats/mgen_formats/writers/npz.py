"""npz: NumPy arrays for `numpy.load(path)`, no pickle."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import IO, Any, BinaryIO

import numpy as np
import pyarrow as pa

from mgen_core import MgenError, Writer

from .arrays import Array, Flat, columns, gather, metadata, rebuild, schema_of
from .intact import intact
from .kind import Kind, kind, refuse_bfloat16

TEXT_BYTES = 4 << 30  # of one text column
Save = Callable[[IO[bytes]], object]


class NpzWriter(Writer):
    """Arrays by column name, streamed through temporary files.

    - a fixed-size column is `NAME` (n, ...);
    - a ragged one is `NAME`, its rows end to end, and `NAME.offsets` (n + 1,): row i is
      `NAME[offsets[i]:offsets[i + 1]]`;
    - text is `NAME`, Unicode as wide as the longest;
    - where a column has nulls, `NAME.valid` is False there, and the entry NaN, 0 or empty;
    - `metadata` is one text, a JSON object.
    """

    spools = True

    def write(self, file: BinaryIO, tables: Iterable[pa.Table], schema: pa.Schema) -> None:
        refuse_bfloat16(schema, self.card.name)
        with columns(tables, schema, self) as spooled:
            found = gather(_saved(spooled, schema))
            # Not numpy.savez: it takes no column called `file` and stamps the hour into the file.
            with zipfile.ZipFile(file, "w") as archive:
                for name, save in found.items():
                    with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as to:
                        save(to)

    def read(self, file: BinaryIO, columns: Sequence[str] | None = None) -> pa.Table:
        with intact(self.card.name), np.load(file, allow_pickle=False) as found:
            schema = schema_of(json.loads(str(found["metadata"])), columns)
            held = [_loaded(found, field, kind(field, self.card.name)) for field in schema]
            return pa.table(held, schema=schema)


def _saved(
    spooled: Iterable[tuple[pa.Field, Kind, Flat]], schema: pa.Schema
) -> Iterator[tuple[str, Save]]:
    for field, of, flat in spooled:
        yield field.name, _text(field.name, flat) if of.text else _array(flat.values)
        if of.ragged:
            yield f"{field.name}.offsets", _array(flat.offsets)
        if flat.valid is not None:
            yield f"{field.name}.valid", _array(flat.valid)
    yield "metadata", _array(np.array(json.dumps(metadata(schema))))


def _array(values: Array) -> Save:
    return lambda entry: np.lib.format.write_array(entry, values, allow_pickle=False)


def _text(name: str, flat: Flat) -> Save:
    """Texts as wide as the longest, a few at a time. Raises `MgenError` where that goes wrong."""
    widest = 0
    for texts in flat.some_texts():
        widest = max(widest, *map(len, texts))
        if any(text.endswith("\0") for text in texts):
            what = f"npz cannot hold a text that ends in a NUL character (column {name!r})"
            raise MgenError(what, "use --writer parquet")
    if flat.rows * widest * 4 > TEXT_BYTES:
        what = f"npz makes every text of {name!r} as wide as the longest, {widest} characters"
        raise MgenError(what, "use --writer parquet")

    def save(entry: IO[bytes]) -> None:
        dtype = np.dtype((np.str_, max(widest, 1)))
        about = {"descr": dtype.str, "fortran_order": False, "shape": (flat.rows,)}
        np.lib.format.write_array_header_2_0(entry, about)
        for texts in flat.some_texts():
            entry.write(np.array(texts, dtype).tobytes())

    return save


def _loaded(found: Any, field: pa.Field, of: Kind) -> pa.Array:
    values = found[field.name]
    valid = found.get(f"{field.name}.valid")
    if of.text:
        there = [True] * len(values) if valid is None else valid.tolist()
        texts = [text if known else None for text, known in zip(values.tolist(), there)]
        return pa.array(texts, field.type)
    lengths = np.diff(found[f"{field.name}.offsets"]) if of.ragged else None
    return rebuild(field, of, Flat(values, lengths, valid))
