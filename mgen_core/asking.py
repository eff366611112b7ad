"""Asking an object store: what it answers with an error is asked again a few times, then told."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from .errors import MgenError, RunError, told

if TYPE_CHECKING:
    from .objects import ObjectPath

T = TypeVar("T")

WAITS_S = (0.5, 1.0, 2.0, 4.0, 8.0)
"""Before each further try."""
PATIENCE_S = 20.0
"""After so long there is no further try: the file system has tried again by itself already."""

OPTIONS = {"s3": {"config_kwargs": {"retries": {"total_max_attempts": 2}}}}
"""Of file systems, where the user has none. s3fs tries five times what botocore has tried so often:
with its default, a server that never answers is told of after six minutes."""

AGAIN = "check the network and the store; the same command goes on where this one stopped"


def ask(verb: str, path: ObjectPath, question: Callable[[Any, str], T], *, again: bool = True) -> T:
    """What the store answers; `question` gets its file system and the path there.

    With `again` it may be asked more than once. Raises `FileNotFoundError` when the file to read is
    not there, and `RunError` for all else.
    """
    began = time.monotonic()
    for wait in (*(WAITS_S if again else ()), None):
        try:
            return question(*_store(path))
        except MgenError:
            raise
        except Exception as error:
            if isinstance(error, FileNotFoundError) and verb == "read":
                raise no_such(path) from error
            if wait is None or _final(error) or time.monotonic() - began > PATIENCE_S:
                raise _store_error(verb, path, error) from error
            time.sleep(wait)
    raise AssertionError("the last try returns or raises")


def no_such(path: ObjectPath) -> FileNotFoundError:
    """The error for a file that is not there."""
    return FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))


def _store_error(verb: str, path: ObjectPath, error: Exception) -> RunError:
    """What the store said, in the user's words."""
    reason = getattr(error, "strerror", None) or (isinstance(error, OSError) and str(error))
    hint = AGAIN
    if isinstance(error, PermissionError) or "Credential" in type(error).__name__:
        hint = f"check the credentials of {path.scheme}://, and what they may do there"
    elif isinstance(error, FileNotFoundError):
        hint = "check the name: a bucket must be there, folders in it need not"
    elif _final(error):
        hint = "choose another place"
    reason = str(reason or told(error)).splitlines()[0]
    return RunError(f"cannot {verb} {path}: {reason:.200}", hint)


_FINAL = (
    FileNotFoundError,
    PermissionError,
    FileExistsError,
    IsADirectoryError,
    NotADirectoryError,
    NotImplementedError,
    ImportError,
    TypeError,
    ValueError,
)


def _final(error: Exception) -> bool:
    """Whether another try would end alike."""
    return isinstance(error, _FINAL) or "Credential" in type(error).__name__


def _store(path: ObjectPath) -> tuple[Any, str]:
    from fsspec.config import conf
    from fsspec.core import url_to_fs

    options = {} if path.scheme in conf else OPTIONS.get(path.scheme, {})
    # What other processes have put there must be seen: nothing is remembered.
    store, key = url_to_fs(str(path), use_listings_cache=False, **options)
    store.invalidate_cache()
    return store, key


def check_scheme(scheme: str, url: str) -> None:
    """Raises `MgenError` for a kind of URL that nothing here can open."""
    from fsspec import get_filesystem_class
    from fsspec.registry import known_implementations

    try:
        get_filesystem_class(scheme)
    except ValueError as error:
        hint = "known are s3://, gs://, hf://, az:// and others of fsspec"
        raise MgenError(f"{url}: nothing here opens {scheme}://", hint) from error
    except ImportError as error:
        package = known_implementations.get(scheme, {}).get("class", "fsspec").partition(".")[0]
        hint = f"pip install {package}" if package != "fsspec" else str(error)
        raise MgenError(f"{url}: what opens {scheme}:// is not installed", hint) from error
