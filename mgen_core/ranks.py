"""The ranks of a run before they compute: they meet, compare what they planned, and begin.

They talk through a key-value store (PyTorch's TCPStore), which rank 0 or the launcher keeps. Once
computing has begun, replicated ranks have nothing more to say to each other.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from .errors import MgenError, RunError
from .manifest import difference
from .turns import PeerFailed
from .world import World

COME_S = 600.0
"""How long a rank may take to show up."""

AGAIN = "start the same command again: it goes on from here"

ENDED = "ended"

BEAT_S, SILENT_S = 2.0, float(os.environ.get("MGEN_SILENT_SECONDS", "60"))
"""How often a rank shows that it is alive, and after how long it is taken for lost."""


class Ranks:
    """This rank's line to the others; alone, it talks to itself."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.store: Any = None if world.size == 1 else open_store(world, first=True)
        self.beats = None if self.store is None else Beats(world)
        self._round = 0

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

    def watch(self) -> None:
        """From here on, end this process when another falls silent: it may wait for it forever.

        Parts are whole or not there: ending on the spot loses no more than the batch at hand.
        """

        def end(told: str) -> None:
            assert self.beats is not None
            if self.world.rank == min(
                set(range(self.world.size)) - self.beats.gone(SILENT_S / 2).keys()
            ):
                sys.stderr.write(f"error: {told}\n  try: {AGAIN}\n")
                sys.stderr.flush()
            time.sleep(1.0)  # what is being written becomes durable
            os._exit(1)

        if self.beats is not None:
            self.beats.on_silence = end

    def lost(self, error: MgenError) -> MgenError:
        """What to say of a connection that broke: who is gone, once for all ranks."""
        assert self.beats is not None
        time.sleep(3 * BEAT_S)  # so long that the one that is gone has missed a beat
        gone = self.beats.gone(3 * BEAT_S)
        speaker = min(set(range(self.world.size)) - gone.keys())
        if self.world.rank != speaker:
            return PeerFailed(error.what)
        if not gone:
            return error
        return RunError("; ".join(gone.values()), AGAIN)

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
            raise RunError("rank 0 is gone", AGAIN) from error
        errors = {rank: told["error"] for rank, told in enumerate(found) if "error" in told}
        if errors and self.leads and 0 not in errors:
            rank, told = next(iter(errors.items()))
            raise RunError(f"rank {rank} on {told['host']}: {told['what']}", told["hint"])
        if errors:
            raise PeerFailed(next(iter(errors.values()))["what"])
        return [told["value"] for told in found]

    def _wait(self, key: str, rank: int) -> Any:
        began = time.monotonic()
        while not self.store.check([key]):
            assert self.beats is not None
            silent = self.beats.silent(rank)
            if silent is None and time.monotonic() - began > COME_S:
                raise RunError(
                    f"rank {rank} of {self.world.size} has not come within {COME_S:.0f} s",
                    "check that its host runs the same command",
                )
            if silent is not None and silent > SILENT_S:
                raise RunError(f"rank {rank} has not been heard of for {silent:.0f} s", AGAIN)
            time.sleep(0.02)
        return json.loads(self.store.get(key))


class Beats:
    """Tells the others that this rank is alive, and where; knows who has fallen silent."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.where = "starting"
        self.on_silence: Callable[[str], None] | None = None
        self._heard: dict[int, tuple[str, float]] = {}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="mgen-beats", daemon=True)
        self._thread.start()

    def silent(self, rank: int) -> float | None:
        """Seconds since a rank was last heard of; None when it never was."""
        if rank == self.world.rank:
            return 0.0
        heard = self._heard.get(rank)
        return None if heard is None else time.monotonic() - heard[1]

    def stop(self) -> None:
        """This rank is through; its silence means nothing from here on."""
        self._ended.set()
        self._thread.join(timeout=2 * BEAT_S)

    def gone(self, seconds: float) -> dict[int, str]:
        """In words, the ranks that were not heard of for so long."""
        now = time.monotonic()
        found = {}
        for rank, (said, when) in sorted(self._heard.items()):
            if said != ENDED and now - when > seconds:
                told = json.loads(said)
                found[rank] = (
                    f"rank {rank} on {told['host']} has not been heard of for {now - when:.0f} s, "
                    f"last {told['where']}"
                )
        return found

    def _run(self) -> None:
        number = 0
        try:
            store = open_store(self.world, first=False)
            while not self._ended.is_set():
                number += 1
                told = {"number": number, "host": self.world.host, "where": self.where}
                store.set(f"beat/{self.world.rank}", json.dumps(told))
                self._listen(store)
                gone = self.gone(SILENT_S)
                if gone and self.on_silence is not None:
                    self.on_silence("; ".join(gone.values()))
                self._ended.wait(BEAT_S)
            store.set(f"beat/{self.world.rank}", ENDED)
        except (MgenError, RuntimeError, OSError):  # rank 0, or the launcher, took the store along
            if not self._ended.is_set() and self.world.rank > 0:
                self._heard.setdefault(0, ('{"host": "its host", "where": "alive"}', 0.0))

    def _listen(self, store: Any) -> None:
        now = time.monotonic()
        for rank in range(self.world.size):
            if rank == self.world.rank or not store.check([f"beat/{rank}"]):
                continue
            said = store.get(f"beat/{rank}").decode()
            if said != self._heard.get(rank, ("", now))[0]:
                self._heard[rank] = (said, now)


def open_store(world: World, *, first: bool) -> Any:
    """A connection to the store; `first` of rank 0 opens the store itself.

    Raises `RunError` when nobody answers.
    """
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    # torchrun keeps the store itself.
    kept = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    try:
        return TCPStore(
            host,
            port,
            world_size=None,
            is_master=first and world.rank == 0 and not kept,
            timeout=timedelta(seconds=COME_S),
            wait_for_workers=False,
        )
    except (RuntimeError, ValueError) as error:
        raise RunError(
            f"{world} cannot reach rank 0 at {host}:{port}: {str(error).splitlines()[0]}",
            "check MASTER_ADDR and MASTER_PORT, and that the port is open between the hosts",
        ) from error
