"""The user's input, whatever its format, as one table of rows: opened, its columns chosen."""

from __future__ import annotations

import glob
import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from .api import BackboneCard, Reader, ReaderCard, ReaderOptions, Row, Rows
from .catalog import Catalog
from .config import RunConfig, checked
from .errors import InputError

ID_NAMES = ("id",)
X_NAMES = ("sequence", "sequences", "seq")


@dataclass(frozen=True)
class Table:
    """One or several opened inputs, read in order; row indices run through all of them."""

    sources: tuple[Rows, ...]
    x_col: str
    id_col: str | None
    fields: tuple[str, ...] = ()
    limit: int | None = None

    def __iter__(self) -> Iterator[Row]:
        return islice(self._rows(), self.limit)

    def _rows(self) -> Iterator[Row]:
        index = 0
        wanted = [name for name in (self.id_col, self.x_col, *self.fields) if name]
        for source in self.sources:
            for chunk in source.chunks(list(dict.fromkeys(wanted))):
                for row in self._chunk(chunk, index):
                    yield row
                    index += 1

    def _chunk(self, chunk: Mapping[str, Sequence[Any]], first: int) -> Iterator[Row]:
        data = chunk[self.x_col]
        ids = chunk[self.id_col] if self.id_col else [None] * len(data)
        fields = [chunk[name] for name in self.fields]
        for offset, (name, value) in enumerate(zip(ids, data)):
            index = first + offset
            label = str(index) if name is None or name == "" else str(name)
            if fields:
                more = {key: column[offset] for key, column in zip(self.fields, fields)}
                yield Row(index, label, value, more)
            else:
                yield Row(index, label, value)

    def digest(self) -> str:
        """A fingerprint of the content and of the choice of columns, not of where it lies."""
        parts = [source.digest() for source in self.sources]
        chosen = [self.x_col, self.id_col or "", *self.fields, str(self.limit)]
        return hashlib.sha256("\n".join([*parts, *chosen]).encode()).hexdigest()


def open_table(config: RunConfig, catalog: Catalog, card: BackboneCard) -> Table:
    """Open the inputs of a run and choose their columns, those that the backbone uses included.

    Raises `InputError` for a file that is not there, of no known format, or without the column
    that was asked for.
    """
    return choose_columns(open_sources(config, catalog), config, card)


def open_sources(config: RunConfig, catalog: Catalog) -> tuple[Rows, ...]:
    """The inputs of a run, opened, in order. Raises `InputError`."""
    return tuple(_open(uri, config, catalog) for uri in _expanded(config.data))


def choose_columns(sources: tuple[Rows, ...], config: RunConfig, card: BackboneCard) -> Table:
    """The table over opened sources. Raises `InputError` for a column that is not there."""
    first = sources[0]
    x_col = config.x_col or first.default_x or _first_of(X_NAMES, first.columns)
    id_col = config.id_col or first.default_id or _first_of(ID_NAMES, first.columns)
    if x_col is None:
        raise InputError(
            f"no column called {', '.join(X_NAMES[:-1])} or {X_NAMES[-1]}",
            f"say which one with --x-col; the columns are: {_listed(first.columns)}",
        )
    asked = {x_col: "--x-col takes one of", **({id_col: "--id-col takes one of"} if id_col else {})}
    for name, why in {
        **dict.fromkeys(card.needs, f"{card.name} needs it; there are"),
        **asked,
    }.items():
        for source in sources:
            if name not in source.columns:
                raise InputError(f"no column {name!r}", f"{why}: {_listed(source.columns)}")
    taken = (n for n in card.takes if all(n in source.columns for source in sources))
    return Table(sources, x_col, id_col, (*card.needs, *taken), config.limit)


def find_reader(uri: str, catalog: Catalog) -> ReaderCard:
    """The reader of a file by its longest suffix, else the first that claims it."""
    cards = [offer.card for offer in catalog.offers(ReaderCard)]
    name = uri.lower()
    fitting = [(len(s), card) for card in cards for s in card.suffixes if name.endswith(s)]
    if fitting:
        return max(fitting, key=lambda pair: pair[0])[1]
    for card in cards:
        if card.claims and card.claims(uri):
            return card
    known = sorted({suffix for card in cards for suffix in card.suffixes})
    raise InputError(
        f"no reader for {uri}",
        f"name the format with --reader ({', '.join(card.name for card in cards)}); "
        f"known by suffix: {' '.join(known)}",
    )


def _open(uri: str, config: RunConfig, catalog: Catalog) -> Rows:
    card = catalog.find(ReaderCard, config.reader) if config.reader else find_reader(uri, catalog)
    claimed = card.claims is not None and card.claims(uri)
    if not os.path.exists(uri) and not claimed:
        raise InputError(f"no such file: {uri}", "check the path")
    reader: Reader = card.load(card, _reader_options(card, config))
    return reader.open(uri)


def _reader_options(card: ReaderCard, config: RunConfig) -> ReaderOptions:
    names = card.options.__dataclass_fields__
    given = {key: value for key, value in config.options.items() if key in names}
    if config.split is not None:
        if "split" not in names:
            raise InputError(f"{card.name} has no splits", "leave out --split")
        given["split"] = config.split
    return checked(card.options, given)


def _expanded(uris: Sequence[str]) -> list[str]:
    found = []
    for uri in uris:
        if os.path.exists(uri) or not glob.has_magic(uri):
            found.append(uri)
        elif matches := sorted(glob.glob(uri, recursive=True)):
            found.extend(matches)
        else:
            raise InputError(f"nothing matches {uri}", "check the pattern")
    return found


def _first_of(names: Sequence[str], columns: Sequence[str]) -> str | None:
    """The column called by one of the names, whatever its case."""
    lower = {column.lower(): column for column in reversed(columns)}
    return next((lower[name] for name in names if name in lower), None)


def _listed(columns: Sequence[str]) -> str:
    return ", ".join(columns[:20]) + (", ..." if len(columns) > 20 else "") or "none"
