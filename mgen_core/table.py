"""The user's input, whatever its format, as one table of rows: opened, its columns chosen."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from .api import NOTHING, BackboneCard, Reader, ReaderCard, ReaderOptions, Row, Rows
from .catalog import Catalog
from .config import RunConfig, checked
from .errors import InputError, MgenError, PluginError, RowError, defect, opening
from .kept import OWN
from .objects import is_url, matches

ID_NAMES = ("id",)
X_NAMES = ("sequence", "sequences", "seq")


@dataclass(frozen=True)
class Table:
    """One or several opened inputs, read in order; row indices run through all of them."""

    sources: tuple[Rows, ...]
    x_col: str
    id_col: str | None
    fields: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()
    limit: int | None = None

    def __iter__(self) -> Iterator[Row]:
        return islice(self._rows(), self.limit)

    def _rows(self) -> Iterator[Row]:
        index = 0
        wanted = [name for name in (self.id_col, self.x_col, *self.fields, *self.kept) if name]
        for source in self.sources:
            for chunk in source.chunks(list(dict.fromkeys(wanted))):
                for row in self._chunk(chunk, index):
                    yield row
                    index += 1

    def _chunk(self, chunk: Mapping[str, Sequence[Any]], first: int) -> Iterator[Row]:
        data = chunk[self.x_col]
        ids = chunk[self.id_col] if self.id_col else [None] * len(data)
        fields = {name: chunk[name] for name in self.fields}
        kept = {name: chunk[name] for name in self.kept}
        unread = _unread(chunk)
        for offset, (name, value) in enumerate(zip(ids, data)):
            index = first + offset
            label = _label(name, index)
            if offset in unread:
                yield Row(index, label, unread[offset])
            elif fields or kept:
                yield Row(index, label, value, _cells(fields, offset), _cells(kept, offset))
            else:
                yield Row(index, label, value)

    def digest(self) -> str:
        """A fingerprint of the content and of the choice of columns, not of where it lies."""
        parts = [source.digest() for source in self.sources]
        chosen = [self.x_col, self.id_col or "", *self.fields, str(self.limit)]
        return hashlib.sha256("\n".join([*parts, *chosen]).encode()).hexdigest()


def _cells(columns: Mapping[str, Sequence[Any]], offset: int) -> Mapping[str, Any]:
    return {name: column[offset] for name, column in columns.items()} if columns else NOTHING


def _unread(chunk: Mapping[str, Sequence[Any]]) -> dict[int, RowError]:
    """Why rows of the chunk could not be read, by their place in it."""
    cells = ((place, cell) for column in chunk.values() for place, cell in enumerate(column))
    return {place: cell for place, cell in cells if isinstance(cell, RowError)}


def _label(name: Any, index: int) -> str:
    """A row's id: as it is written, or its number where there is none."""
    if name is None or name == "" or isinstance(name, RowError):
        return str(index)
    text = str(name)
    # Half a surrogate pair, which JSON allows, is no text: no file could hold it.
    return text if text.isascii() else text.encode("utf-8", "replace").decode()


class Opened(Rows):
    """The rows of a reader: what goes wrong in it is told with its name, and how far it came."""

    def __init__(self, card: ReaderCard, options: ReaderOptions, uri: str, rows: Rows) -> None:
        self.card = card
        self.options = options
        self.uri = uri
        self.rows = rows
        self.columns = rows.columns
        self.default_id, self.default_x = rows.default_id, rows.default_x
        self.length = rows.length

    def chunks(self, columns: Sequence[str]) -> Iterator[Mapping[str, Sequence[Any]]]:
        count = 0
        chunks = iter(self.rows.chunks(columns))
        while True:
            with _reading(self.card, f"{self.uri} after row {count:,}"):
                chunk = next(chunks, None)
                if chunk is None:
                    return
                named = {name: self._named(chunk[name]) for name in columns}
                sizes = {name: len(column) for name, column in named.items()}
                if len(set(sizes.values())) > 1:
                    raise ValueError(f"columns of different lengths: {sizes}")
            yield named
            count += next(iter(sizes.values()), 0)

    def _named(self, column: Sequence[Any]) -> Sequence[Any]:
        """With the reader's name in the reasons why cells could not be read."""
        if not any(issubclass(kind, RowError) for kind in set(map(type, column))):
            return column
        return [
            RowError(f"{self.card.name} cannot read it: {cell}")
            if isinstance(cell, RowError)
            else cell
            for cell in column
        ]

    def digest(self) -> str:
        with _reading(self.card, self.uri):
            return self.rows.digest()


@contextlib.contextmanager
def _reading(card: ReaderCard, where: str) -> Iterator[None]:
    """What a reader raises ends the run: nobody knows which rows are missing."""
    try:
        yield
    except MgenError:
        raise
    except OSError as error:
        what = f"{card.name} cannot read {where}: {error.strerror or error}"
        raise InputError(what, "check the file and its disk") from error
    except Exception as error:
        raise PluginError(
            f"reading {where}: {defect(card, error)}",
            "check what is there in the file; if it is sound, report this to the author of "
            f"the reader {card.name}",
        ) from error


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
        **dict.fromkeys(config.keep, "--keep takes some of"),
        **asked,
    }.items():
        for source in sources:
            if name not in source.columns:
                raise InputError(f"no column {name!r}", f"{why}: {_listed(source.columns)}")
    taken = (n for n in card.takes if all(n in source.columns for source in sources))
    kept = tuple(dict.fromkeys(config.keep))
    for name in OWN.intersection(kept):
        what = f"--keep {name}: every result has a column of this name"
        raise InputError(what, "leave it out, or rename it in the input")
    return Table(sources, x_col, id_col, (*card.needs, *taken), kept, config.limit)


def find_reader(uri: str, catalog: Catalog) -> ReaderCard:
    """The reader of a file by its longest suffix, else the first that claims it."""
    cards = [offer.card for offer in catalog.offers(ReaderCard)]
    name = uri.lower().rstrip("/")
    fitting = [(len(s), card) for card in cards for s in card.suffixes if name.endswith(s)]
    if fitting:
        return max(fitting, key=lambda pair: pair[0])[1]
    for card in cards:
        if _claims(card, uri):
            return card
    known = sorted({suffix for card in cards for suffix in card.suffixes})
    if os.path.isdir(uri):
        raise InputError(f"{uri} is a folder", _inside(uri, known))
    raise InputError(
        f"no reader for {uri}",
        f"name the format with --reader ({', '.join(card.name for card in cards)}); "
        f"known by suffix: {' '.join(known)}",
    )


def _inside(folder: str, known: Sequence[str]) -> str:
    """How to name the files of a folder, by the suffix that most of them have."""
    names = [name.lower() for name in os.listdir(folder)]
    counts = {suffix: sum(name.endswith(suffix) for name in names) for suffix in known}
    suffix = max(counts, key=lambda suffix: counts[suffix], default="")
    if not counts.get(suffix):
        return f"name files of a known kind in it, or its kind with --reader: {' '.join(known)}"
    return f"give its files: '{os.path.join(folder, f'*{suffix}')}'"


def open_object(data: Any, config: RunConfig, catalog: Catalog) -> Rows | None:
    """The rows of an object in memory, by the first reader that takes such; None: there is none."""
    for card in (offer.card for offer in catalog.offers(ReaderCard)):
        if card.takes is not None and card.takes(data):
            return _opened(card, data, f"the {type(data).__name__}", config)
    return None


def _open(uri: str, config: RunConfig, catalog: Catalog) -> Rows:
    card = catalog.find(ReaderCard, config.reader) if config.reader else find_reader(uri, catalog)
    if not _claims(card, uri) and not is_url(uri) and not os.path.exists(uri):
        raise InputError(f"no such file: {uri}", "check the path")
    return _opened(card, uri, uri, config)


def _opened(card: ReaderCard, data: Any, name: str, config: RunConfig) -> Rows:
    options = _reader_options(card, config)
    with _reading(card, name):
        reader: Reader = card.load(card, options)
        return Opened(card, options, name, reader.open(data))


def _claims(card: ReaderCard, uri: str) -> bool:
    with opening(card):
        return card.claims is not None and bool(card.claims(uri))


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
        if not is_url(uri) and (os.path.exists(uri) or not glob.has_magic(uri)):
            found.append(uri)
        elif matching := matches(uri) if is_url(uri) else sorted(glob.glob(uri, recursive=True)):
            found.extend(matching)
        else:
            raise InputError(f"nothing matches {uri}", "check the pattern")
    return found


def _first_of(names: Sequence[str], columns: Sequence[str]) -> str | None:
    """The column called by one of the names, whatever its case."""
    lower = {column.lower(): column for column in reversed(columns)}
    return next((lower[name] for name in names if name in lower), None)


def _listed(columns: Sequence[str]) -> str:
    return ", ".join(columns[:20]) + (", ..." if len(columns) > 20 else "") or "none"
