"""fasta: `>id description`, then the sequence over any number of lines."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import dnaio
from dnaio.readers import FastaReader as Records

from mgen_core import InputError, Reader, Rows

from .source import chunked, digest, local_file, opened, reading


class FastaReader(Reader):
    """Opens FASTA files, plain or compressed."""

    def open(self, uri: str) -> Rows:
        return FastaRows(local_file(uri))


class _Record(NamedTuple):
    # dnaio's own record takes only ASCII; names of organisms and authors are not.
    header: str
    sequence: str
    qualities: None


class FastaRows(Rows):
    """The records of one file, letters as written: lower case, `*` and `-` are kept.

    Lines that start with `#` are comments.
    """

    columns = ("id", "sequence", "description")
    default_id = "id"
    default_x = "sequence"

    def __init__(self, path: Path) -> None:
        self.path = path
        with reading(path), opened(path) as stream:
            if not stream.peek(1):
                raise InputError(f"{path} is empty", "write '>id', then the sequence, a record")

    def chunks(self, columns: Sequence[str]) -> Iterator[Mapping[str, Sequence[Any]]]:
        order = [self.columns.index(name) for name in columns]
        return chunked(
            columns,
            (
                (len(record.header) + len(record.sequence), [_cells(record)[i] for i in order])
                for record in self._records()
            ),
        )

    def digest(self) -> str:
        return digest(self.path)

    def _records(self) -> Iterator[_Record]:
        try:
            with reading(self.path), opened(self.path) as stream:
                records: Iterable[Any] = Records(stream, sequence_class=_Record)
                yield from records
        except dnaio.FastaFormatError as error:
            line = "" if error.line is None else f", line {error.line + 1}"
            hint = "a FASTA record starts with '>id'; a list of sequences goes into a .csv"
            raise InputError(f"{self.path}{line}: {error.message}", hint) from error


def _cells(record: _Record) -> tuple[str, str, str]:
    name, *description = record.header.split(None, 1) or [""]
    return name, record.sequence, "".join(description).strip()
