"""Signs of life of the ranks: each tells where it is, and hears who has fallen silent."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Collection
from datetime import timedelta
from typing import Any

from .errors import MgenError, RunError
from .join import has_ended
from .turns import PeerFailed
from .world import World

COME_S, TRY_S = 600.0, 5.0
"""How long a rank may take to show up, and how long it is called for at a time."""

BEAT_S = 1.0
"""How often a rank tells that it is alive."""

LATE_S = 3 * BEAT_S
"""A living rank is heard of at least so often: its beat, and the look of who listens."""

SILENT_S = float(os.environ.get("MGEN_SILENT_SECONDS", "60"))
"""After how long a rank is taken for lost."""

ENDED = "ended"


class Beats:
    """A thread that tells the store where this rank is, and listens for `peers`."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.where = "starting"
        # Rank 0 waits for everyone, the others for it alone: beats of all to all would be many.
        self.peers: Collection[int] = range(1, world.size) if world.rank == 0 else (0,)
        self.on_silence: Callable[[dict[int, str]], None] | None = None
        self._heard: dict[int, tuple[str, float]] = {}
        self._cut = False
        self._warning = threading.Lock()
        self._ended = threading.Event()
        self._threads = [
            threading.Thread(target=work, name="mgen-beats", daemon=True)
            for work in (self._talk, self._watch)
        ]
        for thread in self._threads:
            thread.start()

    def silent(self, rank: int) -> float | None:
        """Seconds since a rank was last heard of; None when it never was."""
        if rank == self.world.rank:
            return 0.0
        heard = self._heard.get(rank)
        return None if heard is None else time.monotonic() - heard[1]

    def gone(self, seconds: float) -> dict[int, str]:
        """The ranks that were not heard of for so long, each in words.

        Rank 0 alone, when it took the store along: then nobody can be heard of.
        """
        now = time.monotonic()
        return {
            rank: _told(rank, said, None if self._cut else now - when)
            for rank, (said, when) in sorted(self._heard.items())
            if said != ENDED and (rank == 0 if self._cut else now - when > seconds)
        }

    def stop(self) -> None:
        """This rank is through; its silence means nothing from here on."""
        self._ended.set()
        for thread in self._threads:
            thread.join(timeout=LATE_S)

    def _talk(self) -> None:
        number = 0
        try:
            store = open_store(self.world, first=False)
            while not self._ended.is_set():
                number += 1
                told = {"number": number, "host": self.world.host, "where": self.where}
                store.set(f"beat/{self.world.rank}", json.dumps(told))
                self._listen(store)
                self._ended.wait(BEAT_S)
            store.set(f"beat/{self.world.rank}", ENDED)
        except (MgenError, RuntimeError, OSError):  # rank 0, or the launcher, took the store along
            self._cut = True
            if not self._ended.is_set():
                self._warn(0.0)

    def _watch(self) -> None:
        """Look at the clock, apart from who talks: a call into a dead network takes minutes."""
        while not self._ended.wait(BEAT_S):
            self._warn(SILENT_S)

    def _listen(self, store: Any) -> None:
        now = time.monotonic()
        for rank in self.peers:
            if rank == self.world.rank or not store.check([f"beat/{rank}"]):
                continue
            said = store.get(f"beat/{rank}").decode()
            if said != self._heard.get(rank, ("", now))[0]:
                self._heard[rank] = (said, now)

    def _warn(self, seconds: float) -> None:
        gone = self.gone(seconds)
        with self._warning:  # two threads look
            if gone and self.on_silence is not None:
                self.on_silence(gone)
                self.on_silence = None


def _told(rank: int, said: str, seconds: float | None) -> str:
    beat = json.loads(said)
    how = "gone" if seconds is None else f"silent for {seconds:.0f} s"
    return f"rank {rank} on {beat['host']} is {how}, last {beat['where']}"


def open_store(world: World, *, first: bool) -> Any:
    """A connection to the store; `first` of rank 0 opens the store itself.

    Raises `RunError` when nobody answers.
    """
    # Else a connection that fails or is closed is worth twenty lines of C++ to it.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")
    from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    # torchrun keeps the store itself, also over the restarts of its ranks.
    kept = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    began = time.monotonic()
    while True:
        try:
            store = TCPStore(
                host,
                port,
                world_size=None,
                is_master=first and world.rank == 0 and not kept,
                timeout=timedelta(seconds=TRY_S),
                wait_for_workers=False,
            )
            break
        except (RuntimeError, ValueError) as error:
            if has_ended(0, os.environ):
                raise PeerFailed("rank 0 has ended") from error
            if world.rank == 0 or time.monotonic() - began > COME_S:
                raise RunError(
                    f"{world} cannot reach rank 0 at {host}:{port}: {str(error).splitlines()[0]}",
                    "check MASTER_ADDR and MASTER_PORT, and that hosts reach each other's port",
                ) from error
    return PrefixStore(f"mgen/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
