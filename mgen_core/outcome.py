"""What comes of a batch: columns of the rows that were computed, reasons for the others."""

from __future__ import annotations

from itertools import accumulate
from typing import TYPE_CHECKING

from .api import Columns
from .columns import HostColumn, end_to_end
from .config import StoredDtype
from .errors import RowError
from .plan import Batch, Work
from .turns import Fault

if TYPE_CHECKING:
    from .engine import Engine


class Outcome:
    """Gathers what its passes give, in their order."""

    def __init__(self, batch: Batch, work: Work) -> None:
        self.batch = batch
        self.work = work
        self.found: list[Columns] = []
        self.reasons = dict(work.reasons)
        """Why an entry has no columns, by its place in the batch."""
        self._owners = [n for n, count in enumerate(work.counts) for _ in range(count)]
        self._ran: list[int] = []  # the owners of what was found
        self._seen = 0

    def add(self, rows: int, outcome: Columns | Fault) -> None:
        """What came of the next rows."""
        owners = self._owners[self._seen : self._seen + rows]
        self._seen += rows
        if isinstance(outcome, Fault):
            for owner in owners:
                self.reasons.setdefault(owner, outcome.reason)
        elif owners:
            self.found.append(outcome)
            self._ran += owners

    @property
    def complete(self) -> bool:
        """Whether all passes were added."""
        return self._seen == len(self._owners)

    def columns(self, engine: Engine, stored: StoredDtype) -> dict[str, HostColumn]:
        """Columns of the entries that have no reason, in their order; none when there is none.

        What fails over all of them is tried one by one, which may add reasons.
        """
        good = [n for n, count in enumerate(self.work.counts) if n not in self.reasons]
        counts = [self.work.counts[n] for n in good]
        places = [place for place, owner in enumerate(self._ran) if owner not in self.reasons]
        if not good:
            return {}
        everything = len(places) == len(self._owners)
        try:
            return engine.collect(self.found, counts, stored, None if everything else places)
        except RowError as error:
            if len(good) == 1:
                self.reasons[good[0]] = str(error)
                return {}
        alone: list[dict[str, HostColumn]] = []
        for entry, count, end in zip(good, counts, accumulate(counts)):
            try:
                alone.append(engine.collect(self.found, [count], stored, places[end - count : end]))
            except RowError as error:
                self.reasons[entry] = str(error)
        return end_to_end(alone)
