"""What all tests of faults share, and the table of what came of them."""

from __future__ import annotations

import os
from typing import Any

import pytest
import toy
from faults import tiny
from faults.tally import TALLY, Tally

from mgen_core.catalog import Catalog


@pytest.fixture(scope="session")
def catalog() -> Catalog:
    """The installed plugins and the toy."""
    return toy.catalog()


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory, catalog: Catalog) -> tiny.Source:
    """A table, and what undisturbed runs make of it."""
    with pytest.MonkeyPatch.context() as patch:
        tiny.make_small(patch)
        return tiny.make_source(tmp_path_factory.mktemp("source"), catalog)


@pytest.fixture
def tally() -> Tally:
    """Counts what came of faults."""
    return TALLY


def pytest_sessionfinish(session: pytest.Session) -> None:
    """One of several processes tells the first what it has counted."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["faults"] = TALLY.plain()


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """The first one hears it."""
    TALLY.add(getattr(node, "workeroutput", {}).get("faults", {}))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The table, where all faults are tried."""
    if TALLY.faults and os.environ.get("MGEN_TEST_FAULTS") == "1":
        terminalreporter.section("faults")
        for line in TALLY.lines():
            terminalreporter.write_line(line)
