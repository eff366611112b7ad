"""Rows to windows of batches: pure functions, no torch, no files.

The plan depends on the rows and the `PlanSettings` alone, so that every rank, and every later
start of the same run, arrives at the same batches without talking to anyone.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

from .api import Backbone, Row
from .errors import InputError, MgenError, RowError, defect
from .kept import kind

TOO_LONG = "longer than"
NOT_FINITE = "output is not finite"
TooLong = Literal["fail", "truncate"]


@dataclass(frozen=True)
class PlanSettings:
    """Everything beside the rows that the plan depends on.

    - `batch_tokens`: most tokens computed in a batch; one longer row is a batch of its own.
    - `batch_rows`: instead, so many neighbouring rows a batch, repeated ones too.
    - `packed`: the backbone computes no padding (`Backbone.packed`).
    - `max_tokens`: longest row, special tokens included; None: no limit.
    - `window_*`: a window closes when any of these is reached. They bound memory: rows are held,
      and merge restores the input order, a window at a time.
    """

    batch_tokens: int
    batch_rows: int | None = None
    max_tokens: int | None = None
    too_long: TooLong = "fail"
    packed: bool = False
    window_rows: int = 65_536
    window_tokens: int = 2**25
    window_bytes: int = 2**27


class Failure(NamedTuple):
    """A row that was set aside, and why."""

    row: int
    id: str
    reason: str

    @property
    def kind(self) -> str:
        """The reason without its values, so that equal kinds can be counted together."""
        return self.reason.split(" at position ")[0].split(": ")[0]

    def line(self) -> str:
        """The failure as a line of JSON."""
        text = json.dumps(self._asdict(), ensure_ascii=False)
        return text.encode("utf-8", "replace").decode() + "\n"  # half a surrogate pair is no text


class Entry(NamedTuple):
    """One input to compute, and every row of the window that holds it."""

    tokens: int
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class Batch:
    """What is computed, written and committed together. Its number is global."""

    number: int
    entries: tuple[Entry, ...]
    computed: int
    """Tokens that are computed: those with data, and padding where the backbone pads."""

    @property
    def rows(self) -> list[Row]:
        """Every row that this batch answers, duplicates included."""
        return [row for entry in self.entries for row in entry.rows]

    @property
    def tokens(self) -> int:
        """Tokens that carry data."""
        return sum(entry.tokens for entry in self.entries)


@dataclass(frozen=True)
class Window:
    """A run of neighbouring rows, from `first` on, planned together."""

    first: int
    rows: int
    batches: tuple[Batch, ...]
    failures: tuple[Failure, ...]
    notes: Counter[str]

    def digest(self) -> str:
        """Names the batches and what is in their rows."""
        found = hashlib.sha256(repr(self.failures).encode())
        for batch in self.batches:
            found.update(repr((batch.number, *map(_told, batch.entries))).encode())
        return found.hexdigest()


@dataclass
class Survey:
    """What a whole plan comes to; `digest` names the plan itself, `digests` its windows."""

    rows: int = 0
    failed: int = 0
    tokens: int = 0
    computed: int = 0
    distinct: int = 0
    batches: int = 0
    bytes: int = 0
    longest: int = 0
    largest: int = 0
    notes: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    windows: list[tuple[int, int, int, int]] = field(default_factory=list)
    digests: list[str] = field(default_factory=list)
    kept: dict[str, set[str]] = field(default_factory=dict)
    """Of each column that is kept, the kinds of its values."""
    fillers: tuple[Entry, ...] = ()
    """What a rank without work runs: the shortest entry, or else the first one."""
    digest: str = ""

    @property
    def useful(self) -> float:
        """Share of the computed tokens that carry data."""
        return self.tokens / self.computed if self.computed else 1.0


def windows(
    rows: Iterable[Row],
    backbone: Backbone,
    settings: PlanSettings,
    row_bytes: Callable[[int], int] = lambda tokens: 0,
) -> Iterator[Window]:
    """Plan the rows, window by window; `row_bytes(tokens)` estimates a row's output."""
    batches = 0
    for first, entries, failures, notes in _measured(rows, backbone, settings, row_bytes):
        if settings.batch_rows:
            cut = neighbours(entries, settings.batch_rows, batches)
        else:
            cut = make_batches(merge_equal(entries), settings, batches)
        batches += len(cut)
        yield Window(first, len(entries) + len(failures), cut, tuple(failures), notes)


def merge_equal(entries: Sequence[Entry]) -> list[Entry]:
    """Entries with the same data become one, computed once; rows with fields stay apart."""
    found: dict[object, Entry] = {}
    for entry in entries:
        row = entry.rows[0]
        key = row.index if row.fields or not isinstance(row.data, str) else row.data
        earlier = found.get(key)
        found[key] = Entry(entry.tokens, earlier.rows + entry.rows) if earlier else entry
    return list(found.values())


def make_batches(
    entries: Sequence[Entry], settings: PlanSettings, number: int = 0
) -> tuple[Batch, ...]:
    """Longest first, cut where the next entry would exceed the budget.

    Longest first also means that a batch too large for the memory shows at once, not hours in.
    """
    batches: list[Batch] = []
    held: list[Entry] = []
    computed = 0
    for entry in sorted(entries, key=lambda entry: (-entry.tokens, entry.rows[0].index)):
        # Every entry is padded to the longest, which is the first.
        cost = entry.tokens if settings.packed or not held else held[0].tokens
        if held and computed + cost > settings.batch_tokens:
            batches.append(Batch(number + len(batches), tuple(held), computed))
            held, computed, cost = [], 0, entry.tokens
        held.append(entry)
        computed += cost
    if held:
        batches.append(Batch(number + len(batches), tuple(held), computed))
    return tuple(batches)


def neighbours(entries: Sequence[Entry], rows: int, number: int = 0) -> tuple[Batch, ...]:
    """Batches of so many rows, in the order of the input: for models to which batches matter."""
    cuts = [tuple(entries[first : first + rows]) for first in range(0, len(entries), rows)]
    return tuple(
        Batch(number + place, cut, max(entry.tokens for entry in cut) * len(cut))
        for place, cut in enumerate(cuts)
    )


class Work(NamedTuple):
    """What a batch runs: passes of rows within the budget.

    `counts` says how many of them each entry of the batch is; `reasons` why an entry, by its place
    in the batch, is none.
    """

    passes: tuple[tuple[Row, ...], ...]
    counts: tuple[int, ...]
    reasons: Mapping[int, str] = MappingProxyType({})


def make_work(
    batch: Batch,
    variants: Callable[[Row], Sequence[Row]],
    measure: Callable[[Row], int],
    settings: PlanSettings,
) -> Work:
    """The batch itself as one pass; several where the task runs variants of a row.

    `variants` and `measure` may raise `RowError`. A pass without rows is one of a batch that has
    nothing to run.
    """
    expanded: list[list[tuple[Row, int]]] = []
    reasons: dict[int, str] = {}
    for place, entry in enumerate(batch.entries):
        try:
            expanded.append([(row, measure(row)) for row in variants(entry.rows[0])])
        except RowError as error:
            expanded.append([])
            reasons[place] = str(error)
    passes: list[list[Row]] = [[]]
    most = max(settings.batch_tokens, batch.computed)
    longest = held = 0
    for row, tokens in (pair for pairs in expanded for pair in pairs):
        longest, held = max(longest, tokens), held + tokens
        computed = held if settings.packed else (len(passes[-1]) + 1) * longest
        if passes[-1] and computed > most:
            passes.append([])
            longest = held = tokens
        passes[-1].append(row)
    return Work(tuple(map(tuple, passes)), tuple(map(len, expanded)), reasons)


def deal(batches: Sequence[Batch], loads: list[int]) -> list[list[Batch]]:
    """One list of batches a rank, near equal in computed tokens: costliest first, to the idlest.

    `loads` are the tokens that each rank has from the windows before, to which these are added: a
    window may hold fewer batches than there are ranks. Each list is in the order of the plan:
    longest rows first.
    """
    ranks: list[list[Batch]] = [[] for _ in loads]
    for batch in sorted(batches, key=lambda batch: (-batch.computed, batch.number)):
        rank = loads.index(min(loads))
        ranks[rank].append(batch)
        loads[rank] += batch.computed
    return [sorted(mine, key=lambda batch: batch.number) for mine in ranks]


def survey(planned: Iterable[Window], row_bytes: Callable[[int], int]) -> Iterator[Window | Survey]:
    """Passes the windows through and gives, last, what they came to."""
    total = Survey()
    for window in planned:
        total.windows.append((window.first, window.rows, total.batches, len(window.batches)))
        total.digests.append(window.digest())
        total.rows += window.rows
        total.failed += len(window.failures)
        total.notes += window.notes
        total.reasons.update(failure.kind for failure in window.failures)
        for batch in window.batches:
            _add(total, batch, row_bytes)
        yield window
    total.digest = hashlib.sha256("".join(total.digests).encode()).hexdigest()
    yield total


def unchanged(planned: Iterable[Window], survey: Survey) -> Iterator[Window]:
    """The windows of a plan that is made again, as long as they are those of the survey.

    Raises `InputError` when they are not: somebody has written to the input.
    """
    for place, (window, digest) in enumerate(zip_longest(planned, survey.digests)):
        if window is None or window.digest() != digest:
            first = survey.windows[place][0] if digest else survey.rows
            raise InputError(
                f"the input was changed while mgen was reading it, in row {first:,} or behind it",
                "restore it and start the same command again, or start anew with --overwrite",
            )
        yield window


def _add(total: Survey, batch: Batch, row_bytes: Callable[[int], int]) -> None:
    total.batches += 1
    total.distinct += len(batch.entries)
    total.tokens += batch.tokens
    total.computed += batch.computed
    total.longest = max(total.longest, batch.entries[0].tokens)
    total.largest = max(total.largest, batch.computed)
    last = batch.entries[-1]
    if not total.fillers or last.tokens < total.fillers[0].tokens:
        first = total.fillers[1] if total.fillers else batch.entries[0]
        total.fillers = (last, first)
    total.bytes += sum(row_bytes(entry.tokens) * len(entry.rows) for entry in batch.entries)
    for name in batch.rows[0].kept:
        total.kept.setdefault(name, set()).update(kind(row.kept[name]) for row in batch.rows)


def _told(entry: Entry) -> tuple[Any, ...]:
    """What `repr` tells an entry by."""
    row = entry.rows[0]
    data = row.data if isinstance(row.data, str) else _plain(row.data)
    names = [(row.index, row.id, *map(_plain, row.kept.items())) for row in entry.rows]
    return (entry.tokens, names, data, _plain(row.fields) if row.fields else None)


def _plain(value: Any) -> Any:
    """A value as text, numbers and digests, the same whenever it is read.

    Of what has none of these, its type alone.
    """
    if isinstance(value, (str, int, float, bytes, type(None))):
        return value
    if isinstance(value, Mapping):
        value = list(value.items())
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    with contextlib.suppress(TypeError, ValueError):
        view = memoryview(value)
        if "O" not in view.format:  # of objects these are addresses
            # Not as they are: their text would be several times as long.
            return hashlib.sha256(view if view.c_contiguous else view.tobytes()).digest()
    return type(value).__name__


def _measured(
    rows: Iterable[Row],
    backbone: Backbone,
    settings: PlanSettings,
    row_bytes: Callable[[int], int],
) -> Iterator[tuple[int, list[Entry], list[Failure], Counter[str]]]:
    """Rows, prepared and measured, cut into windows."""
    first = tokens = size = 0
    entries: list[Entry] = []
    failures: list[Failure] = []
    notes: Counter[str] = Counter()
    for row in rows:
        try:
            entry = _entry(row, backbone, settings, notes)
        except RowError as error:
            failures.append(Failure(row.index, row.id, str(error)))
        else:
            entries.append(entry)
            tokens += entry.tokens
            size += row_bytes(entry.tokens)
        count = len(entries) + len(failures)
        if len(entries) % (settings.batch_rows or 1) == 0 and (
            count >= settings.window_rows
            or tokens >= settings.window_tokens
            or size >= settings.window_bytes
        ):
            yield first, entries, failures, notes
            first, tokens, size = first + count, 0, 0
            entries, failures, notes = [], [], Counter()
    if entries or failures:
        yield first, entries, failures, notes


def _entry(row: Row, backbone: Backbone, settings: PlanSettings, notes: Counter[str]) -> Entry:
    """Raises `RowError` for a row that cannot be computed."""
    if isinstance(row.data, RowError):  # the reader could not read it
        raise row.data
    try:  # not `blaming`: that would cost a microsecond for every row of the input
        prepared = backbone.prepare(row)
        tokens = backbone.measure(prepared)
        if note := backbone.note(row, prepared):
            notes[note] += 1
        limit = settings.max_tokens
        if limit is not None and tokens > limit:
            if settings.too_long == "fail":
                raise RowError(f"{TOO_LONG} {limit:,} tokens: {tokens:,}")
            notes["truncated"] += 1
            prepared = backbone.truncate(prepared, limit)
            tokens = backbone.measure(prepared)
    except (MgenError, RowError):
        raise
    except Exception as error:
        raise defect(backbone.card, error) from error
    if prepared.kept is not row.kept:  # a row that was made anew
        prepared = prepared._replace(kept=row.kept)
    return Entry(tokens, (prepared,))
