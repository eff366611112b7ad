"""Forward passes in turns: a rank alone, or a group of ranks that must keep step.

A turn is one forward pass of every rank of the group. After it the ranks agree on what came of
it, before anything of it is kept: so each takes the same number of turns, an error of one ends
all, and one rank's lack of memory makes all of them do the turn again with less.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Generic, NamedTuple, Protocol, TypeVar

from .api import Columns, Inputs, Row
from .errors import MgenError, RunError
from .plan import Batch, Work

T = TypeVar("T")


class Pass(NamedTuple):
    """One forward pass of a batch, its rows collated."""

    batch: Batch
    work: Work
    rows: Sequence[Row]
    inputs: Inputs


class Turn(NamedTuple):
    """What a rank, or a group, has to say of a turn; the larger number of each wins.

    - `more`: passes are left after this one.
    - `stop`: a signal came.
    - `memory`: tokens of the pass for which memory did not suffice, or 0.
    - `failed`: something else went wrong.
    """

    more: bool = False
    stop: bool = False
    memory: int = 0
    failed: bool = False


class OutOfMemory(Exception):
    """The device has not enough memory for a forward pass."""


AGAIN = "start the same command again: it goes on from here"


class Lost(MgenError):
    """The connection to another rank broke."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"another rank is gone ({reason})", AGAIN)


class PeerFailed(MgenError):
    """Another rank failed, and told the user why."""


class Runner(Protocol):
    """What computes: an engine."""

    def agree(self, turn: Turn) -> Turn: ...

    def forward(self, rows: Sequence[Row], inputs: Inputs) -> Columns: ...

    def idle(self) -> None: ...


class Piece(NamedTuple):
    """A pass, or a part of one for which memory did not suffice."""

    whole: Pass
    rows: Sequence[Row]
    inputs: Inputs
    tokens: int
    last: bool


class Turns:
    """Runs passes. `limit` is what was learned of the memory: most tokens at once, or None."""

    def __init__(
        self,
        engine: Runner,
        collate: Callable[[Sequence[Row]], Inputs],
        cost: Callable[[Sequence[Row]], int],
        told: Callable[[int], None] = lambda limit: None,
    ) -> None:
        self.engine = engine
        self.collate = collate
        self.cost = cost
        self.told = told
        self.limit: int | None = None

    def run(
        self,
        passes: Iterable[Pass],
        use: Callable[[Piece, Columns], None],
        stopped: Callable[[], bool] = lambda: False,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        """Compute the passes; `use` gets each piece with its columns, once the group agreed.

        `check` raises what went wrong elsewhere in this process. Raises what went wrong in it,
        `PeerFailed` when that was another, and `RunError` when the memory does not suffice for a
        single row.
        """
        source = Peekable(passes)
        pieces: deque[Piece] = deque()
        error: Exception | None = None
        while True:
            memory, more = 0, False
            columns: Columns | None = None
            try:
                check()
                if not pieces and source.more():
                    pieces.extend(self._pieces(next(source)))
            except Exception as caught:
                error = error or caught
            # Whatever went wrong here before, the group counts on this rank for the pass.
            try:
                if pieces and error is None:
                    columns = self.engine.forward(pieces[0].rows, pieces[0].inputs)
                else:
                    self.engine.idle()
                more = len(pieces) > 1 or source.more()
            except OutOfMemory:
                more, memory = True, pieces[0].tokens if pieces else 1
                if not pieces or len(pieces[0].rows) == 1:
                    error = error or too_long(pieces[0] if pieces else None)
            except Exception as caught:
                error = error or caught
            failed = error is not None
            turn = self.engine.agree(Turn(more, stopped(), memory, failed))
            if error is not None:
                raise error
            if turn.failed:
                raise PeerFailed("another rank failed")
            if turn.memory:
                self._learn(turn.memory // 2)
                pieces = deque(part for piece in pieces for part in self._split(piece))
                continue
            last = turn.stop or not turn.more
            if columns is not None:
                try:
                    use(pieces.popleft(), columns)
                except Exception as caught:
                    if last:
                        raise
                    error = caught  # the group hears of it in the next turn
            if last:
                return

    def _learn(self, limit: int) -> None:
        if self.limit is None or limit < self.limit:
            self.limit = limit
            self.told(limit)

    def _pieces(self, whole: Pass) -> Iterator[Piece]:
        piece = Piece(whole, whole.rows, whole.inputs, self.cost(whole.rows), True)
        return self._split(piece)

    def _split(self, piece: Piece) -> Iterator[Piece]:
        """The piece in halves, as often as it takes to be within the limit."""
        if self.limit is None or piece.tokens <= self.limit or len(piece.rows) == 1:
            yield piece
            return
        half = len(piece.rows) // 2
        for rows, last in ((piece.rows[:half], False), (piece.rows[half:], piece.last)):
            part = Piece(piece.whole, rows, self.collate(rows), self.cost(rows), last)
            yield from self._split(part)


def too_long(piece: Piece | None) -> MgenError:
    """What to tell when the memory does not suffice for one row."""
    if piece is None:
        return RunError("the model leaves no memory for even the shortest row", HINT)
    row = piece.rows[0]
    return RunError(
        f"out of memory with one row alone: row {row.index} (id {row.id}), {piece.tokens:,} tokens",
        HINT,
    )


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
