"""What all tests of faults share."""

import pytest
import toy


@pytest.fixture(scope="session")
def catalog():
    """The installed plugins and the toy."""
    return toy.catalog()
