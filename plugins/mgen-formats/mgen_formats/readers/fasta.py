"""fasta: `>id description`, then the sequence over any number of lines."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mgen_core import InputError, Reader, RowError, Rows

from .source import (
    LONGEST,
    NOT_TEXT,
    chunked,
    digest,
    is_text,
    lines,
    not_utf8,
    opened,
    readable,
    reading,
    too_long,
)


class FastaReader(Reader):
    """Opens FASTA files, plain or compressed."""

    def open(self, uri: str) -> Rows:
        return FastaRows(readable(uri))


class FastaRows(Rows):
    """The records of one file, letters as written: lower case, `*` and `-` are kept.

    Lines that start with `#` are comments. A record with bytes that are no text is a bad row.
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
                (len(header) + len(sequence), [_cells(line, header, sequence)[i] for i in order])
                for line, header, sequence in _records(self.path)
            ),
        )

    def digest(self) -> str:
        return digest(self.path)


def _records(path: Path) -> Iterator[tuple[int, str, str]]:
    """First line, header and sequence of each record. Raises `InputError`."""
    first, header, letters = 0, None, io.StringIO()  # takes less memory than a list of short lines
    for number, line in enumerate(lines(path), 1):
        text = line.strip()
        if text.startswith(">"):
            if header is not None:
                yield first, header, letters.getvalue()
            first, header, letters = number, text[1:], io.StringIO()
        elif text and not text.startswith("#"):
            if header is None:
                if not is_text(text):
                    raise not_utf8(path)
                what = f"{path}, line {number}: expected '>', but found {text[:40]!r}"
                hint = "a FASTA record starts with '>id'; a list of sequences goes into a .csv"
                raise InputError(what, hint)
            letters.write(text)
            if letters.tell() > LONGEST:
                raise too_long(f"{path}, line {number}: a sequence")
    if header is not None:
        yield first, header, letters.getvalue()


def _cells(line: int, header: str, sequence: str) -> list[str | RowError]:
    name, *description = header.split(None, 1) or [""]
    cells = [name, sequence, "".join(description).strip()]
    broken = RowError(f"{NOT_TEXT}: the record of line {line}")
    return [cell if is_text(cell) else broken for cell in cells]
