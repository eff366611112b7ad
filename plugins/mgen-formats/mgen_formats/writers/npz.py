"""npz: NumPy arrays for `numpy.load(path)`, no pickle."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa

from mgen_core import MgenError, Writer

from .arrays import Array, Flat, columns, gather, metadata, rebuild, schema_of
from .intact import intact
from .kind import Kind, kind, refuse_bfloat16

TEXT_BYTES = 4 << 30  # of one text column


class NpzWriter(Writer):
    """Arrays by column name, held in memory while they are written.

    - a fixed-size column is `NAME` (n, ...);
    - a ragged one is `NAME`, its rows end to end, and `NAME.offsets` (n + 1,): row i is
      `NAME[offsets[i]:offsets[i + 1]]`;
    - text is `NAME`, Unicode as wide as the longest;
    - where a column has nulls, `NAME.valid` is False there, and the entry NaN, 0 or empty;
    - `metadata` is one text, a JSON object.
    """

    def write(self, file: BinaryIO, tables: Iterable[pa.Table], schema: pa.Schema) -> None:
        refuse_bfloat16(schema, self.card.name)
        found = gather(_saved(tables, schema, self.card.name))
        # Not numpy.savez: it takes no column called `file` and stamps the hour into the file.
        with zipfile.ZipFile(file, "w") as archive:
            for name, values in found.items():
                with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as entry:
                    np.lib.format.write_array(entry, values, allow_pickle=False)

    def read(self, file: BinaryIO) -> pa.Table:
        with intact(self.card.name), np.load(file, allow_pickle=False) as found:
            schema = schema_of(json.loads(str(found["metadata"])))
            held = [_loaded(found, field, kind(field, self.card.name)) for field in schema]
            return pa.table(held, schema=schema)


def _saved(
    tables: Iterable[pa.Table], schema: pa.Schema, writer: str
) -> Iterator[tuple[str, Array]]:
    for field, of, flat in columns(tables, schema, writer):
        yield field.name, _unicode(field.name, flat) if of.text else flat.values
        if of.ragged:
            yield f"{field.name}.offsets", flat.offsets
        if flat.valid is not None:
            yield f"{field.name}.valid", flat.valid
    yield "metadata", np.array(json.dumps(metadata(schema)))


def _unicode(name: str, flat: Flat) -> Array:
    texts = [text or "" for text in flat.texts()]
    if any(text.endswith("\0") for text in texts):
        what = f"npz cannot hold a text that ends in a NUL character (column {name!r})"
        raise MgenError(what, "use --writer parquet")
    widest = max(map(len, texts), default=0)
    if len(texts) * widest * 4 > TEXT_BYTES:
        what = f"npz makes every text of {name!r} as wide as the longest, {widest} characters"
        raise MgenError(what, "use --writer parquet")
    return np.array(texts, dtype=np.str_)


def _loaded(found: Any, field: pa.Field, of: Kind) -> pa.Array:
    values = found[field.name]
    valid = found.get(f"{field.name}.valid")
    if of.text:
        there = [True] * len(values) if valid is None else valid.tolist()
        texts = [text if known else None for text, known in zip(values.tolist(), there)]
        return pa.array(texts, field.type)
    lengths = np.diff(found[f"{field.name}.offsets"]) if of.ragged else None
    return rebuild(field, of, Flat(values, lengths, valid))
