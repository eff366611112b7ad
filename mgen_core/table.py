"""The user's input, whatever its format, as one table of rows: opened, its columns chosen."""

from __future__ import annotations

import glob
import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from .api import Reader, ReaderCard, ReaderOptions, Row, Rows
from .catalog import Catalog
from .config import RunConfig, checked, make_options
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


def open_table(config: RunConfig, catalog: Catalog, needs: Sequence[str] = ()) -> Table:
    """Open the inputs of a run and choose their columns; `needs` are further ones.

    Raises `InputError` for a file that is not there, of no known format, or without the column
    that was asked for.
    """
    sources = tuple(_open(uri, config, catalog) for uri in _expanded(config.data))
    return choose_columns(sources, config, needs)


def choose_columns(sources: tuple[Rows, ...], config: RunConfig, needs: Sequence[str]) -> Table:
    """The table over opened sources. Raises `InputError` for a column that is not there."""
    first = sources[0]
    x_col = config.x_col or first.default_x or _first_of(X_NAMES, first.columns)
    id_col = config.id_col or first.default_id or _first_of(ID_NAMES, first.columns)
    if x_col is None:
        raise InputError(
            f"no column called {', '.join(X_NAMES[:-1])} or {X_NAMES[-1]}",
            f"say which one with --x-col; the columns are: {_listed(first.columns)}",
        )
    for name, flag in ((x_col, "--x-col"), (id_col, "--id-col"), *((n, "") for n in needs)):
        for source in sources:
            if name is not None and name not in source.columns:
                hint = f"the columns are: {_listed(source.columns)}"
                raise InputError(
                    f"no column {name!r}",
                    f"{flag} takes one of them; {hint}"
                    if flag
                    else f"this backbone needs it; {hint}",
                )
    return Table(sources, x_col, id_col, tuple(needs), config.limit)


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
    (given,) = make_options([card.options], _known(card.options, config.options))
    options = checked(card.options, {**given, "split": config.split})
    reader: Reader = card.load(card, options)
    return reader.open(uri)


def _known(kind: type[ReaderOptions], options: Mapping[str, Any]) -> dict[str, Any]:
    names = kind.__dataclass_fields__
    return {key: value for key, value in options.items() if key in names}


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
