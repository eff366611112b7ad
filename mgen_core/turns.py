"""Forward passes in turns: a rank alone, or a group of ranks that must keep step.

A turn is one forward pass of every rank of the group. After it the ranks agree on what came of
it, before anything of it is kept: so each takes the same number of turns, an error of one ends
all, and one rank's lack of memory makes all of them do the turn again with less.

A pass that fails over its rows is split until the row that fails it stands alone: that row is set
aside. Of this the other ranks notice nothing but the number of turns.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Generic, NamedTuple, Protocol, TypeVar

from .api import Columns, Inputs, Row
from .errors import MgenError, RowError, RunError
from .plan import Batch, Work

T = TypeVar("T")

OUT_OF_MEMORY = "out of memory with one row alone"


class Fault(NamedTuple):
    """Why rows could not be computed together: the reason to set one aside that is alone."""

    reason: str
    memory: bool = False


class Pass(NamedTuple):
    """One forward pass of a batch, its rows collated, or why they could not be."""

    batch: Batch
    work: Work
    rows: Sequence[Row]
    inputs: Inputs | Fault


class Turn(NamedTuple):
    """What a rank, or a group, has to say of a turn; the larger number of each wins.

    - `more`: passes are left after this one.
    - `stop`: a signal came.
    - `memory`: tokens of the pass for which memory did not suffice, or 0.
    - `failed`: something went wrong that ends the run.
    """

    more: bool = False
    stop: bool = False
    memory: int = 0
    failed: bool = False


class OutOfMemory(Exception):
    """There is not enough memory for a forward pass, or for what goes into it."""


AGAIN = "start the same command again: it goes on from here"


class Lost(MgenError):
    """The connection to another rank broke."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"another rank is gone ({reason})", AGAIN)


class PeerFailed(MgenError):
    """Another rank failed, and told the user why."""


class Runner(Protocol):
    """What computes: an engine. `collate` and `forward` raise `RowError` or `OutOfMemory`."""

    def agree(self, turn: Turn) -> Turn: ...

    def collate(self, rows: Sequence[Row]) -> Inputs: ...

    def forward(self, rows: Sequence[Row], inputs: Inputs) -> Columns: ...

    def idle(self) -> None: ...


class Piece(NamedTuple):
    """A pass, or a part of one that did not come through as a whole."""

    whole: Pass
    rows: Sequence[Row]
    inputs: Inputs | Fault
    tokens: int


class Turns:
    """Runs passes. `limit` is what was learned of the memory: most tokens at once, or None."""

    def __init__(
        self,
        engine: Runner,
        cost: Callable[[Sequence[Row]], int],
        told: Callable[[int], None] = lambda limit: None,
    ) -> None:
        self.engine = engine
        self.cost = cost
        self.told = told
        self.limit: int | None = None

    def run(
        self,
        passes: Iterable[Pass],
        use: Callable[[Piece, Columns | Fault], None],
        stopped: Callable[[], bool] = lambda: False,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        """Compute the passes; `use` gets each piece with its columns, once the group agreed.

        A row that fails alone comes with its `Fault` instead.

        `check` raises what went wrong elsewhere in this process. Raises what went wrong in it, and
        `PeerFailed` when that was another.
        """
        source = Peekable(passes)
        pieces: deque[Piece] = deque()
        error: Exception | None = None
        while True:
            outcome: Columns | Fault | None = None
            halves: list[Piece] = []
            memory, more = 0, False
            try:
                check()
                if not pieces and source.more():
                    pieces.extend(self._pieces(next(source)))
            except Exception as caught:
                error = error or caught
            # Whatever went wrong here before, the group counts on this rank for the pass.
            try:
                outcome = self._compute(pieces[0] if pieces and error is None else None)
                if isinstance(outcome, Fault) and len(pieces[0].rows) > 1:
                    memory = pieces[0].tokens if outcome.memory else 0
                    halves = [] if memory else self._halves(pieces[0])
                more = bool(halves) or len(pieces) > 1 or source.more()
            except Exception as caught:
                error = error or caught
            turn = self.engine.agree(Turn(more, stopped(), memory, error is not None))
            if error is not None:
                raise error
            if turn.failed:
                raise PeerFailed("another rank failed")
            last = not turn.memory and (turn.stop or not turn.more)
            try:
                if turn.memory:
                    self._learn(turn.memory // 2)
                    pieces = deque(part for piece in pieces for part in self._split(piece))
                elif outcome is not None:
                    piece = pieces.popleft()
                    pieces.extendleft(reversed(halves))
                    if not halves:
                        use(piece, outcome)
            except Exception as caught:
                if last:
                    raise
                error = caught  # the group hears of it in the next turn
            if last:
                return

    def _compute(self, piece: Piece | None) -> Columns | Fault | None:
        """One pass of this rank: of the piece, or of none. Raises what ends the run."""
        if piece is not None and piece.rows and not isinstance(piece.inputs, Fault):
            inputs = piece.inputs
            found = attempt(lambda: self.engine.forward(piece.rows, inputs))
        else:
            self._idle()
            if piece is None:
                return None
            found = piece.inputs if isinstance(piece.inputs, Fault) else {}
        if isinstance(found, Fault) and found.memory and len(piece.rows) == 1:
            return Fault(f"{OUT_OF_MEMORY}: {piece.tokens:,} tokens", memory=True)
        return found

    def _idle(self) -> None:
        try:
            self.engine.idle()
        except RowError:
            return  # what it computes is nobody's row
        except OutOfMemory:
            raise RunError("the model leaves no memory for even the shortest row", HINT) from None

    def _learn(self, limit: int) -> None:
        if self.limit is None or limit < self.limit:
            self.limit = limit
            self.told(limit)

    def _pieces(self, whole: Pass) -> Iterator[Piece]:
        return self._split(Piece(whole, whole.rows, whole.inputs, self._cost(whole.rows)))

    def _split(self, piece: Piece) -> Iterator[Piece]:
        """The piece in halves, as often as it takes to be within the limit."""
        if self.limit is None or piece.tokens <= self.limit or len(piece.rows) <= 1:
            yield piece
            return
        for part in self._halves(piece):
            yield from self._split(part)

    def _halves(self, piece: Piece) -> list[Piece]:
        half = len(piece.rows) // 2
        return [
            Piece(piece.whole, rows, collated(self.engine, rows), self._cost(rows))
            for rows in (piece.rows[:half], piece.rows[half:])
        ]

    def _cost(self, rows: Sequence[Row]) -> int:
        found = attempt(lambda: self.cost(rows)) if rows else 0
        return 0 if isinstance(found, Fault) else found  # what it stumbled on, collate does too


def collated(engine: Runner, rows: Sequence[Row]) -> Inputs | Fault:
    """What goes into a pass of these rows, or why there is nothing."""
    return attempt(lambda: engine.collate(rows)) if rows else None


def attempt(work: Callable[[], T]) -> T | Fault:
    """What `work` gives, or why its rows cannot be computed together."""
    try:
        return work()
    except RowError as error:
        return Fault(str(error))
    except OutOfMemory:
        return Fault(OUT_OF_MEMORY, memory=True)


HINT = "set long rows aside with --max-length, or give it more memory: `mgen doctor` says how"


class Peekable(Generic[T]):
    """An iterator that can say whether it has more."""

    def __init__(self, items: Iterable[T]) -> None:
        self._items = iter(items)
        self._held: list[T] = []

    def more(self) -> bool:
        """Whether there is a next item; makes it."""
        if not self._held:
            self._held.extend(item for item in [next(self._items, None)] if item is not None)
        return bool(self._held)

    def __next__(self) -> T:
        if not self.more():
            raise StopIteration
        return self._held.pop()
