"""A file on its way out: what it is given is counted and digested, before any disk sees it."""

from __future__ import annotations

import hashlib
import io
from typing import Any, NamedTuple


class Written(NamedTuple):
    """A file that is durable: its bytes, and their SHA-256 as `sha256sum` prints it, or ""."""

    bytes: int
    sha256: str


class Stream(io.RawIOBase):
    """A new file, written from its start to its end; where to is what `take` knows."""

    def __init__(self, *, digest: bool = True) -> None:
        self._digest = hashlib.sha256() if digest else None
        self._bytes = 0

    def take(self, view: memoryview) -> int:
        """Write as much of it as can be, and say how much that was."""
        raise NotImplementedError

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        with memoryview(data).cast("B") as view:
            taken = self.take(view)
            if self._digest is not None:
                self._digest.update(view[:taken])
        self._bytes += taken
        return taken

    def tell(self) -> int:
        return self._bytes

    def written(self) -> Written:
        """What came of it."""
        return Written(self._bytes, self._digest.hexdigest() if self._digest is not None else "")
