"""SIGTERM and Ctrl-C, heard: a run ends after the batch at hand, not in the midst of a write."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator

from .errors import Stopped

ONCE_S = 0.5
"""Signals that come together ask once."""


class Stop:
    """Set by SIGTERM or Ctrl-C: finish the batch at hand, write what is computed, end."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self._came = 0.0

    def __call__(self, number: int, frame: object) -> None:
        now = time.monotonic()
        if self.signal is None:
            self.signal, self._came = number, now
        # Asked twice: at once. A parent that dies is told once for each of its threads.
        elif now - self._came > ONCE_S:
            raise KeyboardInterrupt

    def check(self) -> None:
        """Raises `Stopped` when a signal came."""
        if self.signal is not None:
            raise Stopped(self.signal)


@contextlib.contextmanager
def stoppable() -> Iterator[Stop]:
    """Signals become a `Stop` in the main thread; elsewhere they are left alone."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, action in before.items():
            signal.signal(number, action)
