"""parquet, a few rows at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mgen_core import Reader, Rows

from .arrow import chunk
from .source import CHUNK_BYTES, chunk_rows, digest, handle, no_twins, readable, reading

# Without pre-buffering and with small reads, no whole row group comes into memory.
LEAN = {"pre_buffer": False, "buffer_size": 1 << 20}


class ParquetReader(Reader):
    """Opens parquet files."""

    def open(self, uri: str) -> Rows:
        return ParquetRows(readable(uri))


class ParquetRows(Rows):
    """The rows of one file; only the columns asked for are read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with _reading(path), pq.ParquetFile(handle(path)) as file:
            self.columns = no_twins(path, file.schema_arrow.names)
            self.length = file.metadata.num_rows

    def chunks(self, columns: Sequence[str]) -> Iterator[Mapping[str, Sequence[Any]]]:
        with _reading(self.path), pq.ParquetFile(handle(self.path), **LEAN) as file:
            texts = [name for name in columns if _is_text(file.schema_arrow.field(name).type)]
            for group in range(file.num_row_groups):
                # Of all columns: damaged sizes of single ones make Arrow abort the process.
                told = file.metadata.row_group(group)
                usual = chunk_rows(told.num_rows, told.total_byte_size)
                rows = min(usual, CHUNK_BYTES // max(1, self._longest(group, texts)) or 1)
                read = {"columns": list(columns), "use_threads": False}
                for batch in file.iter_batches(rows, row_groups=[group], **read):
                    yield chunk(batch, columns)

    def _longest(self, group: int, texts: Sequence[str]) -> int:
        """Bytes of the longest text that the group holds once and may repeat in every row."""
        with pq.ParquetFile(handle(self.path), read_dictionary=list(texts), **LEAN) as file:
            first = next(file.iter_batches(1, row_groups=[group], columns=list(texts)), ())
        found = [column.dictionary for column in first if pa.types.is_dictionary(column.type)]
        return max((pc.max(pc.binary_length(texts)).as_py() or 0 for texts in found), default=0)

    def digest(self) -> str:
        return digest(self.path)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """`reading`, and what Cython makes of the exceptions that Arrow's C++ forgot to catch."""
    with reading(path):
        try:
            yield
        except pa.ArrowException:
            raise
        except (ArithmeticError, IndexError, MemoryError, RuntimeError) as error:
            raise pa.ArrowInvalid(str(error)) from error


def _is_text(of: pa.DataType) -> bool:
    stored = of.value_type if pa.types.is_dictionary(of) else of
    return stored in (pa.string(), pa.large_string(), pa.binary(), pa.large_binary())
