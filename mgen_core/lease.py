"""Who is at work in a run directory on an object store, where there are no locks.

Each process puts an object into `run.lock/` and renews it as long as it lives; one that was not
renewed for a minute, by the store's own clock, is of a process that is gone. Who comes first
writes, then looks: of two that start at once, at least one sees the other, and gives way.

It is no lock: a process that was halted for longer than a minute may find, once it goes on, that
another has begun. It then stops before it acknowledges anything.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import socket
import threading
from collections.abc import Iterator

from .errors import RunError
from .objects import ObjectPath, facts
from .upload import put_all, remove_file

STALE_S = float(os.environ.get("MGEN_LEASE_SECONDS", "60"))
"""After so long without a sign of life a process counts as gone."""

RENEW_S = STALE_S / 4

ALONE, SHARED = "alone", "shared"

_held: list[Lease] = []


class Lease:
    """A process's place in a run directory: alone, or shared with others of the same run."""

    def __init__(self, folder: ObjectPath) -> None:
        self.folder = folder
        host = re.sub(r"[^A-Za-z0-9.-]", "_", socket.gethostname())
        self._name = f"{host}-{os.getpid()}-{secrets.token_hex(3)}"
        self._kind = ALONE
        self._over = threading.Event()
        self._changing = threading.Lock()
        self._lost = False
        self._renewal = threading.Thread(target=self._renew, name="mgen-lease", daemon=True)

    @property
    def path(self) -> ObjectPath:
        """The object that tells of this process."""
        return self.folder / f"{self._kind}-{self._name}"

    def take(self, *, shared: bool) -> None:
        """Raises `RunError` when another process is at work that does not share."""
        self._kind = SHARED if shared else ALONE
        try:
            self._put()
            self._give_way(shared=shared)
        except BaseException:
            self._remove()
            raise
        self._renewal.start()

    def share(self) -> None:
        """Let other processes share it."""
        with self._changing:
            alone = self.path
            self._kind = SHARED
            self._put()
            remove_file(alone)

    def alone(self) -> bool:
        """Whether no other process shares it any more."""
        return not self._others()

    def check(self) -> None:
        """Raises `RunError` when another process took this one for gone."""
        if self._lost:
            raise RunError(
                f"this mgen was silent for {STALE_S:.0f} s, and another began in "
                f"{self.folder.parent}",
                "let the other one finish",
            )

    def drop(self) -> None:
        """This process is through."""
        self._over.set()
        if self._renewal.is_alive():
            self._renewal.join(timeout=RENEW_S)  # a store may keep it waiting
        self._remove()

    def _give_way(self, *, shared: bool) -> None:
        others = [name for name in self._others() if not shared or name.startswith(ALONE)]
        if others:
            who = others[0].partition("-")[2].rpartition("-")[0]
            raise RunError(
                f"another mgen ({who}) is at work in {self.folder.parent}",
                f"wait for it, stop it, or choose another --output; if it was killed, wait "
                f"{STALE_S:.0f} s",
            )

    def _remove(self) -> None:
        with contextlib.suppress(RunError):  # it grows old by itself
            remove_file(self.path)

    def _put(self) -> None:
        put_all({self.path: lambda file: file.write(b"at work\n")})

    def _others(self) -> list[str]:
        """Names of the processes that are alive; what is left of others is removed."""
        there = facts(self.folder)
        mine = there.pop(self.path.name, None)
        now = mine and mine.modified  # by the store: clocks of hosts differ
        alive = []
        for name, (_, renewed) in sorted(there.items()):
            if now and renewed and now - renewed > STALE_S:
                remove_file(self.folder / name)
            else:
                alive.append(name)
        return alive

    def _renew(self) -> None:
        while not self._over.wait(RENEW_S):
            with contextlib.suppress(RunError), self._changing:  # the next time, then
                if not self.path.exists():
                    self._lost = True
                    return
                self._put()


@contextlib.contextmanager
def lease(folder: ObjectPath, *, shared: bool = False) -> Iterator[Lease]:
    """Hold a place in the folder; raises `RunError` as `Lease.take` does."""
    held = Lease(folder)
    held.take(shared=shared)
    _held.append(held)
    try:
        yield held
    finally:
        _held.remove(held)
        held.drop()


def check(path: ObjectPath) -> None:
    """Raises `RunError` when this process has lost its place in the run that the path is in."""
    for held in _held:
        if str(path).startswith(f"{held.folder.parent}/"):
            held.check()
