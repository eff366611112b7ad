"""parquet, a few rows at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from mgen_core import Reader, Rows

from .arrow import chunk
from .source import chunk_rows, digest, local_file, no_twins, reading


class ParquetReader(Reader):
    """Opens parquet files."""

    def open(self, uri: str) -> Rows:
        return ParquetRows(local_file(uri))


class ParquetRows(Rows):
    """The rows of one file; only the columns asked for are read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with reading(path), pq.ParquetFile(path) as file:
            self.columns = no_twins(path, file.schema_arrow.names)
            self.length = file.metadata.num_rows

    def chunks(self, columns: Sequence[str]) -> Iterator[Mapping[str, Sequence[Any]]]:
        # Without pre-buffering and with small reads, no whole row group comes into memory.
        lean = {"pre_buffer": False, "buffer_size": 1 << 20}
        with reading(self.path), pq.ParquetFile(self.path, **lean) as file:
            rows = chunk_rows(file.metadata.num_rows, _size(file, columns))
            for batch in file.iter_batches(rows, columns=list(columns), use_threads=False):
                yield chunk(batch, columns)

    def digest(self) -> str:
        return digest(self.path)


def _size(file: pq.ParquetFile, columns: Sequence[str]) -> int:
    """Bytes of the named columns, decompressed."""
    groups = [file.metadata.row_group(number) for number in range(file.num_row_groups)]
    leaves = [group.column(number) for group in groups for number in range(group.num_columns)]
    wanted = tuple(f"{name}." for name in columns)
    return sum(
        leaf.total_uncompressed_size
        for leaf in leaves
        if f"{leaf.path_in_schema}.".startswith(wanted)
    )
