"""Where a process stands among those of its run: plain data."""

from __future__ import annotations

import socket
from dataclasses import dataclass, field


@dataclass(frozen=True)
class World:
    """One of `size` ranks; `local_rank` of `local_size` on its host."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    host: str = field(default_factory=socket.gethostname)

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host}"
