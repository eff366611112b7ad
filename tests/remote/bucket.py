"""An S3 server on loopback, and what goes wrong between it and its clients."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

FAULTS = ("500", "503", "dropped", "answer lost", "cut short", "late")
ANSWERS = {
    "403": (b"AccessDenied", "403 Forbidden"),
    "500": (b"InternalError", "500 Internal Server Error"),
    "503": (b"SlowDown", "503 Slow Down"),
}
LATE_S = 1.5
READ_TIMEOUT_S = 1

ERROR = b"<?xml version='1.0'?><Error><Code>%s</Code><Message>injected</Message></Error>"


@dataclass
class Faulty:
    """A WSGI application whose k-th request, and the `length - 1` after it, end in a fault."""

    app: Callable[..., Iterable[bytes]]
    fault: str = "none"
    at: int = 0
    length: int = 1
    count: int = 0
    only: str = ""
    faults: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def plan(self, fault: str, at: int, length: int = 1, only: str = "") -> None:
        """From now on requests are counted from 1; `only` those of a method count."""
        with self.lock:
            self.fault, self.at, self.length, self.only = fault, at, length, only
            self.count = self.faults = 0

    def heal(self) -> int:
        """No more faults; says how many there were."""
        with self.lock:
            self.fault = "none"
            return self.faults

    def __call__(self, environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        with self.lock:
            counts = self.only in ("", environ["REQUEST_METHOD"])
            self.count += counts
            now = counts and self.at <= self.count < self.at + self.length
            now = now and self.fault != "none"
            self.faults += now
            fault = self.fault if now else "none"
        return self._answer(fault, environ, start)

    def _answer(
        self, fault: str, environ: dict[str, Any], start: Callable[..., Any]
    ) -> Iterable[bytes]:
        if fault in ANSWERS:
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            code, words = ANSWERS[fault]
            start(words, [("Content-Type", "application/xml")])
            return [b"" if environ["REQUEST_METHOD"] == "HEAD" else ERROR % code]
        if fault == "dropped":
            _drop(environ)
            return []
        if fault == "answer lost":
            for _ in self.app(environ, lambda *words: lambda data: None):
                pass
            _drop(environ)
            return []
        if fault == "cut short":
            return _cut(b"".join(self.app(environ, start)), environ)
        if fault == "late":
            time.sleep(LATE_S)
        return self.app(environ, start)


def _drop(environ: dict[str, Any]) -> None:
    with contextlib.suppress(OSError):
        environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)


def _cut(body: bytes, environ: dict[str, Any]) -> Iterator[bytes]:
    yield body[: len(body) // 2]
    _drop(environ)


@contextlib.contextmanager
def serving() -> Iterator[tuple[str, Faulty]]:
    """A server with an empty S3, its URL, and its faults."""
    faulty = Faulty(DomainDispatcherApplication(create_backend_app))
    server = make_server("127.0.0.1", 0, faulty, threaded=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", faulty
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
