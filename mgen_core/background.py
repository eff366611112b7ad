"""Work beside the main thread: items made ahead of their use, and results written behind it."""

from __future__ import annotations

import queue
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from typing import Generic, TypeVar

T = TypeVar("T")

LONGEST_REST_S = 1.0


def beside(work: Callable[[], None], name: str) -> threading.Thread:
    """Starts a thread, in which torch has no threads of its own.

    With more of them than there are cores, OpenMP lets those of the forward pass sleep at each of
    its barriers: it took a tenth longer.
    """
    torch = sys.modules.get("torch")
    threads = torch.get_num_threads() if torch else 0
    begun = threading.Event()

    def run() -> None:
        if torch:
            torch.get_num_threads()  # a thread's first question sets its number anew
            torch.set_num_threads(1)
        begun.set()
        work()

    thread = threading.Thread(target=run, name=name, daemon=True)
    thread.start()
    begun.wait()
    if torch:
        torch.set_num_threads(threads)  # that was of this thread too, and of those to come
    return thread


def ahead(items: Iterable[T], depth: int = 4) -> Generator[T, None, None]:
    """The same items, made by a thread that stays up to `depth` of them ahead.

    An exception of the producer is raised here, after the items before it. Leaving the loop
    early stops the thread.
    """
    ready: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue(depth)
    stop = threading.Event()

    def put(item: T | None, error: BaseException | None = None) -> None:
        while not stop.is_set():
            try:
                return ready.put((item, error), timeout=0.1)
            except queue.Full:
                continue

    def produce() -> None:
        try:
            for item in items:
                put(item)
                if stop.is_set():
                    return
        except BaseException as error:
            put(None, error)
        else:
            put(None, StopIteration())

    thread = beside(produce, "mgen-ahead")
    try:
        while True:
            item, error = ready.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            yield item  # type: ignore[misc]
    finally:
        stop.set()
        thread.join()


class Behind(Generic[T]):
    """Calls `work` on the items in one thread, in order, `most` items and `room` bytes behind.

    `work` gets all the items that are waiting, so that what costs once a call (a file, making it
    durable) costs less the further it is behind. After a call it rests `rest` times as long as
    that took, a second at most, unless half of the room is taken: work that takes a core from the
    main thread comes in few pieces.

    Once `work` has raised, no further item is worked on and the exception comes out of the next
    `put`, or of leaving the `with` block: nothing is acknowledged after a failure.
    """

    def __init__(
        self,
        work: Callable[[Sequence[T]], None],
        most: int = 256,
        room: int = 2**27,
        rest: float = 0,
    ) -> None:
        self._work = work
        self._most = most
        self._room = room
        self._rest = rest
        self._items: list[T] = []
        self._bytes = 0
        self._full = False
        self._ended = False
        self._changed = threading.Condition()
        self._error: BaseException | None = None

    def put(self, item: T, size: int = 0) -> None:
        """Hand over one item of so many bytes; waits while there is no room for it."""
        with self._changed:
            if not self._fits(size):
                self._full = True
                self._changed.notify_all()
            self._changed.wait_for(lambda: self._error is not None or self._fits(size))
            self.check()
            self._items.append(item)
            self._bytes += size
            self._changed.notify_all()

    def _fits(self, size: int) -> bool:
        many = len(self._items) >= self._most or self._bytes + size > self._room
        return not self._items or not many

    def check(self) -> None:
        """Raises what `work` has raised."""
        if self._error is not None:
            raise self._error

    def __enter__(self) -> Behind[T]:
        self._thread = beside(self._run, "mgen-behind")
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        with self._changed:
            self._ended = True
            self._changed.notify_all()
        self._thread.join()
        if self._error is not None and error is not self._error:
            raise self._error

    def _run(self) -> None:
        rested = 0.0
        while waiting := self._taken(rested):
            if self._error is None:
                begun = time.monotonic()
                try:
                    self._work(waiting)
                except BaseException as error:
                    with self._changed:
                        self._error = error
                        self._changed.notify_all()
                now = time.monotonic()
                rested = now + min(self._rest * (now - begun), LONGEST_REST_S)

    def _taken(self, rested: float) -> list[T]:
        """All that is waiting when it has rested; nothing when nothing comes any more."""
        with self._changed:
            self._changed.wait_for(lambda: self._items or self._ended)
            self._changed.wait_for(self._pressed, max(rested - time.monotonic(), 0))
            taken, self._items, self._bytes, self._full = self._items, [], 0, False
            self._changed.notify_all()
            return taken

    def _pressed(self) -> bool:
        half = 2 * self._bytes >= self._room or 2 * len(self._items) >= self._most
        return half or self._full or self._ended or self._error is not None
