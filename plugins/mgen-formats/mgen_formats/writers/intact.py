"""What the libraries raise for a bad file or disk, as an error that the user can mend."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from mgen_core import RunError


@contextmanager
def intact(writer: str) -> Iterator[None]:
    """Turn whatever a library raises for a damaged file into `RunError`."""
    try:
        yield
    except Exception as error:  # torch, zip, safetensors and Arrow each have their own
        raise RunError(f"this is no {writer} file of mgen: {error}", "make it again") from error


@contextmanager
def saving() -> Iterator[None]:
    """Turn what a library raises for a disk that takes no more into `RunError`."""
    try:
        yield
    except OSError:
        raise  # says what and where by itself
    except Exception as error:
        raise RunError(f"cannot write: {error}", "is the disk full?") from error
