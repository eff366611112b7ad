"""The ranks of a run before they compute: they meet, compare what they planned, and begin.

They talk through a key-value store (PyTorch's TCPStore), which rank 0 or the launcher keeps. Once
computing has begun, replicated ranks have nothing more to say to each other.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from .beats import BEAT_S, COME_S, LATE_S, SILENT_S, Beats, open_store
from .errors import MgenError, RunError
from .join import FAILED, has_ended
from .manifest import difference
from .turns import AGAIN, PeerFailed
from .world import World

LOOK_S, HEARD_S = 0.02, 5.0
"""How often a rank looks whether the others have spoken, and how long rank 0 waits for ears."""

TOGETHER = 70
"""Exit code of a rank that ends because another did: our launcher then ends all."""


class Ranks:
    """This rank's line to the others; alone, it talks to itself."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.store: Any = None if world.size == 1 else open_store(world, first=True)
        self.beats = None if self.store is None else Beats(world)
        self._round = 0
        self._group: Sequence[int] = (world.rank,)

    @property
    def leads(self) -> bool:
        """Whether this is the rank that decides, records and speaks."""
        return self.world.rank == 0

    def exchange(self, value: Any) -> list[Any]:
        """What every rank gave in this round, in order of ranks.

        Raises `PeerFailed` or, in rank 0, `RunError` when another rank failed before it.
        """
        return self._exchange({"value": value})

    def compare(self, value: dict[str, Any]) -> None:
        """Raises `RunError` unless every rank gives the same."""
        mine, *others = self.exchange(value)
        for rank, other in enumerate(others, start=1):
            if self.leads and (changes := difference(mine, other)):
                raise RunError(
                    f"rank {rank} is about to do another run ({'; '.join(changes)})",
                    "each rank must see the same input, weights and plugins",
                )

    def at(self, where: str) -> None:
        """What to tell of this rank if it falls silent."""
        if self.beats is not None:
            self.beats.where = where

    @contextmanager
    def together(self) -> Iterator[None]:
        """An error in this block ends the run on every rank, and is told once."""
        try:
            yield
        except PeerFailed:
            raise
        except Exception as error:
            if self.store is not None:
                self._tell(error)
            raise

    def watch(self, group: Sequence[int]) -> None:
        """From here on, end this process when another of its group falls silent.

        It may wait for it forever. Parts are whole or not there: ending on the spot loses no more
        than the batch at hand.
        """
        if self.beats is None:
            return
        self._group = group
        self.beats.peers = {0, *group} if self.world.rank else range(1, self.world.size)

        def end(gone: dict[int, str]) -> None:
            if not gone.keys() & {0, *group}:
                return
            if self._speaks(gone):
                sys.stderr.write(f"error: {'; '.join(gone.values())}\n  try: {AGAIN}\n")
                sys.stderr.flush()
            time.sleep(1.0)  # what is being written becomes durable
            os._exit(TOGETHER if FAILED in os.environ else 1)

        self.beats.on_silence = end

    def lost(self, error: MgenError) -> MgenError:
        """What to say of a connection that broke: who is gone, and that once for all ranks."""
        assert self.beats is not None
        time.sleep(LATE_S + 2 * BEAT_S)  # until the silence of the one that is gone is heard
        gone = self.beats.gone(LATE_S)
        if not self._speaks(gone):
            return PeerFailed(error.what)
        return RunError("; ".join(gone.values()), AGAIN) if gone else error

    def _speaks(self, gone: Collection[int]) -> bool:
        """Whether this is the first of the group that is not gone."""
        return self.world.rank == min(set(self._group) - set(gone))

    def close(self) -> None:
        """No more is to be said."""
        if self.beats is not None:
            self.beats.stop()

    def _tell(self, error: Exception) -> None:
        """Let the others know; rank 0 says it to the user, a bug keeps its traceback."""
        known = isinstance(error, MgenError)
        what = str(error) if known else f"{type(error).__name__}: {error}"
        told = {"what": what, "hint": getattr(error, "hint", ""), "host": self.world.host}
        try:
            self._exchange({"error": told})
        except PeerFailed as heard:
            if known and not self.leads:
                raise heard from error
        except MgenError:  # rank 0 is gone: nobody else will say it
            return

    def _exchange(self, mine: dict[str, Any]) -> list[Any]:
        if self.store is None:
            return [mine["value"]]
        number, self._round = self._round, self._round + 1
        try:
            self.store.set(f"up/{number}/{self.world.rank}", json.dumps(mine))
            if self.leads:
                found = [self._wait(f"up/{number}/{rank}", rank) for rank in range(self.world.size)]
                self.store.set(f"down/{number}", json.dumps(found))
            else:
                found = self._wait(f"down/{number}", 0)
        except (RuntimeError, OSError) as error:  # what a broken connection raises
            # Our own launcher tells who was killed; whoever failed otherwise has told why.
            gone = PeerFailed if FAILED in os.environ else RunError
            raise gone("rank 0 is gone", AGAIN) from error
        errors = {rank: told["error"] for rank, told in enumerate(found) if "error" in told}
        if errors:
            self._until_heard()
        if errors and self.leads and 0 not in errors:
            rank, told = next(iter(errors.items()))
            raise RunError(f"rank {rank} on {told['host']}: {told['what']}", told["hint"])
        if errors:
            raise PeerFailed(next(iter(errors.values()))["what"])
        return [told["value"] for told in found]

    def _until_heard(self) -> None:
        """Rank 0 keeps the store, so it stays until the others know that the run ends."""
        heard = [f"heard/{rank}" for rank in range(1, self.world.size)]
        if not self.leads:
            self.store.set(f"heard/{self.world.rank}", "")
            return
        began = time.monotonic()
        while not self.store.check(heard) and time.monotonic() - began < HEARD_S:
            time.sleep(LOOK_S)

    def _wait(self, key: str, rank: int) -> Any:
        began = time.monotonic()
        while not self.store.check([key]):
            assert self.beats is not None
            if has_ended(rank, os.environ):
                raise PeerFailed(f"rank {rank} has ended")
            silent = self.beats.silent(rank)
            if silent is None and time.monotonic() - began > COME_S:
                raise RunError(
                    f"rank {rank} of {self.world.size} has not come within {COME_S:.0f} s",
                    "check that its host runs the same command",
                )
            if silent is not None and silent > SILENT_S:
                raise RunError(f"rank {rank} has not been heard of for {silent:.0f} s", AGAIN)
            time.sleep(LOOK_S)
        return json.loads(self.store.get(key))
