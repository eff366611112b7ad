"""Rows set aside: the table of all of a run, their kinds counted, and when there are too many."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import DEFECT, MgenError, PluginError, RunError, printable
from .manifest import Done, Manifest
from .objects import place
from .plan import NOT_FINITE, TOO_LONG, Failure
from .turns import HINT, OUT_OF_MEMORY

if TYPE_CHECKING:
    from .config import RunConfig
    from .parts import Computed

ALIKE = 8
"""So many different inputs that fail in one way before any other worked are no accident."""

MOST_KINDS = 5


def failures(run: str | Path) -> Iterator[Failure]:
    """The rows of a run that were set aside (`row`, `id`, `reason`), in input order.

    Read as they are asked for. Raises `RunError` for a folder without a run.
    """
    manifest = Manifest.open(place(str(run)))
    return set_aside(manifest, manifest.done())


def set_aside(manifest: Manifest, done: Sequence[Done]) -> Iterator[Failure]:
    """The same of an opened run: what failed in the plan, and in the batches that are done."""
    planned = Failures(manifest.planned_failures())
    for first, rows, _, parts in manifest.by_window(done):
        found = planned.before(first + rows)
        for part in parts:
            found.extend(manifest.part_failures(part))
        yield from sorted(found)


class Failures:
    """Rows set aside, taken in input order."""

    def __init__(self, failures: Iterator[Failure]) -> None:
        self._failures = failures
        self._next = next(failures, None)

    def before(self, row: int) -> list[Failure]:
        """Those before a row that were not taken yet."""
        found = []
        while self._next is not None and self._next.row < row:
            found.append(self._next)
            self._next = next(self._failures, None)
        return found


def kinds(manifest: Manifest, done: Sequence[Done]) -> Counter[str]:
    """How many rows were set aside for each kind of reason."""
    return Counter(failure.kind for failure in set_aside(manifest, done))


def kind_lines(found: Counter[str]) -> list[str]:
    """The counts in words, most frequent first, few enough to be read."""
    first = found.most_common(MOST_KINDS)
    lines = [f"{_rows(count)}: {printable(kind)}" for kind, count in first]
    if len(found) > len(first):
        rest = found.total() - sum(count for _, count in first)
        lines.append(f"{_rows(rest)}: {len(found) - len(first):,} other reasons")
    return lines


def where_told(folder: Path) -> str:
    """Where the rows themselves are to be found, after their number."""
    listing = f"mgen status {shlex.quote(str(folder))} --failed"
    return f", kept in {folder / 'failed'}; {listing} lists them"


def stop_at(found: Sequence[Failure], config: RunConfig) -> None:
    """Raises `RunError` for the first one, where the user wants it so."""
    if found and config.on_error == "stop":
        row, name, reason = found[0]
        raise RunError(
            f"row {row} (id {name}): {reason}", "--on-error skip sets such rows aside and goes on"
        )


class Trial:
    """Batches of which no row could be computed are held until one of another could.

    A plugin that fails on everything is told at once, not found in a million reasons hours later;
    and once it is mended, the same command finds nothing set aside because of it. `passed`: this
    run has computed a row.
    """

    def __init__(self, config: RunConfig, passed: bool) -> None:
        self.config = config
        self.passed = passed
        self.held: list[Computed] = []

    def admit(self, computed: Sequence[Computed]) -> list[Computed]:
        """What may be committed. Raises `MgenError` when too many failed alike."""
        for one in computed:
            stop_at(one.failures, self.config)
            self.passed = self.passed or one.table.num_rows > 0
        self.held.extend(computed)
        if self.passed:
            good, self.held = self.held, []
            return good
        found = [failure for one in self.held for failure in one.failures]
        sizes = [len(one.batch.entries) for one in self.held]
        if found and found[0].kind == OUT_OF_MEMORY:
            sizes = [size for size in sizes if size > 1]  # a row that is a batch alone is long
        if sum(sizes) >= ALIKE and len({failure.kind for failure in found}) == 1:
            raise hopeless(f"none of the first {len(found):,} rows can be computed", found[0])
        return []


def nothing_done(manifest: Manifest) -> MgenError:
    """What to say of a run that has come to its end without a row."""
    done = manifest.done()
    (kind, _), *_ = kinds(manifest, done).most_common(1)
    example = next(failure for failure in set_aside(manifest, done) if failure.kind == kind)
    what = f"none of the {manifest.rows:,} rows could be computed"
    error = hopeless(what, example)
    error.hint += "; --overwrite tries these rows again"
    return error


def hopeless(what: str, example: Failure) -> MgenError:
    """An error for rows that all fail like this one."""
    kind = PluginError if DEFECT in example.kind else RunError
    return kind(f"{what}: {example.reason}", remedy(example.kind, "check the input"))


def remedy(kind: str, otherwise: str) -> str:
    """What to do about rows that fail in this way."""
    remedies = {
        TOO_LONG: "--too-long truncate cuts them, --max-length N takes longer ones",
        NOT_FINITE: "try --precision fp32 and --dtype float32; or the weights are damaged",
        OUT_OF_MEMORY: HINT,
        DEFECT: "report it to the author of that plugin, with such a row; "
        "if it is the long rows alone, --max-length N sets them aside",
    }
    return next((text for part, text in remedies.items() if part in kind), otherwise)


def _rows(count: int) -> str:
    return f"{count:,} row{'' if count == 1 else 's'}"
