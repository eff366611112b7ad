"""Settings of every test."""

from itertools import count

import pytest
from hypothesis import settings

# A shared machine is slow at times; how long an example takes is not what these tests are about.
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")

NUMBERS = count()


@pytest.fixture(autouse=True)
def nothing_remembered(tmp_path_factory, monkeypatch):
    """What a test measures of this machine is for that test alone."""
    folder = tmp_path_factory.getbasetemp() / f"remembered-{next(NUMBERS)}"
    monkeypatch.setenv("MGEN_CACHE", str(folder))
