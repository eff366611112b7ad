"""pt: a dictionary for `torch.load(path, weights_only=True)`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import torch

from mgen_core import Writer

from .arrays import Array, Flat, columns, gather, metadata, rebuild, schema_of
from .intact import intact, saving
from .kind import Kind, kind


class PtWriter(Writer):
    """Tensors and lists by column name, streamed through temporary files.

    Text, and about a kilobyte a row of each ragged column, are held in memory while written.

    - a fixed-size column is a tensor (n, ...); where it has nulls, they are NaN (0 in whole
      numbers) and `NAME.valid` is a bool tensor;
    - a ragged one is a list of tensors, each with a storage of its own; None is null;
    - text is a list of `str`; None is null;
    - `metadata` is a dictionary of `str`.
    """

    spools = True

    def write(self, file: BinaryIO, tables: Iterable[pa.Table], schema: pa.Schema) -> None:
        with columns(tables, schema, self) as spooled:
            found = gather(_saved(spooled, schema))
            with saving():
                torch.save(found, file)

    def read(self, file: BinaryIO, columns: Sequence[str] | None = None) -> pa.Table:
        with intact(self.card.name):
            found = torch.load(file, map_location="cpu", weights_only=True)
            schema = schema_of(found["metadata"], columns)
            held = [_loaded(found, field, kind(field, self.card.name)) for field in schema]
            return pa.table(held, schema=schema)


def _saved(
    spooled: Iterable[tuple[pa.Field, Kind, Flat]], schema: pa.Schema
) -> Iterator[tuple[str, Any]]:
    for field, of, flat in spooled:
        if of.text:
            yield field.name, flat.texts()
        elif of.ragged:
            yield (
                field.name,
                [None if entry is None else tensor(entry, of) for entry in flat.entries()],
            )
        else:
            yield field.name, tensor(flat.values, of)
            if flat.valid is not None:
                yield f"{field.name}.valid", torch.from_numpy(flat.valid)
    yield "metadata", metadata(schema)


def _loaded(found: dict[str, Any], field: pa.Field, of: Kind) -> pa.Array:
    held = found[field.name]
    if of.text:
        return pa.array(held, field.type)
    if not of.ragged:
        return rebuild(
            field, of, Flat(array(held, of), None, optional(found, f"{field.name}.valid"))
        )
    none = np.empty((0, *of.shape), of.leaf.to_pandas_dtype())
    entries = [none if entry is None else array(entry, of) for entry in held]
    lengths = np.fromiter(map(len, entries), np.int64, len(entries))
    valid = np.fromiter((entry is not None for entry in held), bool, len(held))
    return rebuild(field, of, Flat(np.concatenate([none, *entries]), lengths, valid))


def tensor(values: Array, of: Kind) -> torch.Tensor:
    """A tensor that shares the memory of `values`."""
    found = torch.from_numpy(values)
    return found.view(torch.bfloat16) if of.bfloat16 else found


def array(found: torch.Tensor, of: Kind) -> Array:
    """The array of a tensor; bfloat16 as its bits in uint16."""
    bits = found.view(torch.uint16) if of.bfloat16 else found
    values: Array = bits.numpy()
    return values


def optional(found: Mapping[str, Any], name: str) -> Array | None:
    """The array of a tensor that may be absent."""
    return found[name].numpy() if name in found else None
