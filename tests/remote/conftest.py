"""A bucket for each test, on a server that all of them share."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator

import fsspec
import pytest
import toy
from fsspec.config import conf
from remote.bucket import READ_TIMEOUT_S, Faulty, serving

from mgen_core import asking, lease
from mgen_core.catalog import Catalog

NUMBERS = itertools.count()


@pytest.fixture(scope="session")
def catalog() -> Catalog:
    """The installed plugins and the toy."""
    return toy.catalog()


@pytest.fixture(scope="session")
def server() -> Iterator[tuple[str, Faulty]]:
    """The server's URL, and its faults."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    with serving() as started:
        yield started


@pytest.fixture
def bucket(server: tuple[str, Faulty], monkeypatch: pytest.MonkeyPatch) -> str:
    """The URL of an empty bucket. Clients do not wait long, and try few times."""
    for name, value in {
        "AWS_ENDPOINT_URL": server[0],
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_MAX_ATTEMPTS": "1",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setitem(conf, "s3", {"config_kwargs": {"read_timeout": READ_TIMEOUT_S}})
    monkeypatch.setattr("s3fs.S3FileSystem.retries", 1)
    monkeypatch.setattr(asking, "WAITS_S", (0.001, 0.001))
    server[1].heal()
    name = f"bucket-{next(NUMBERS)}"
    fsspec.filesystem("s3", use_listings_cache=False).mkdir(name)
    return f"s3://{name}"


@pytest.fixture
def faulty(server: tuple[str, Faulty], bucket: str) -> Iterator[Faulty]:
    """What goes wrong on the way to the bucket."""
    yield server[1]
    server[1].heal()


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leases that are renewed often, and soon are old."""
    monkeypatch.setattr(lease, "STALE_S", 1.0)
    monkeypatch.setattr(lease, "RENEW_S", 0.1)


@pytest.fixture
def memory() -> Iterator[str]:
    """The URL of an empty folder in this process's memory."""
    yield f"memory://{next(NUMBERS)}"
    fsspec.filesystem("memory").store.clear()
