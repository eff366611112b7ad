"""What was measured on this machine, remembered for later runs: a small file of JSON.

To lose it costs measuring again, so nothing that goes wrong with it ends a run.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

from . import storage
from .errors import MgenError

MOST = 256  # numbers that are kept: those of the last runs
MOST_BYTES = 2**20


def folder(environ: Mapping[str, str] = os.environ) -> Path:
    """`MGEN_CACHE`, or the folder `mgen` among the user's caches."""
    if own := environ.get("MGEN_CACHE"):
        return Path(own)
    caches = Path(environ.get("XDG_CACHE_HOME", ""))
    # The XDG specification: a relative path is to be ignored.
    return (caches if caches.is_absolute() else Path("~/.cache").expanduser()) / "mgen"


def recall(file: str, key: str) -> int | None:
    """The number that was kept under the key; None where there is none that can be read."""
    return _read(folder() / file).get(key)


def keep(file: str, key: str, number: int) -> None:
    """Keep the number, if the folder can be written to."""
    path = folder() / file
    known = {name: value for name, value in _read(path).items() if name != key}
    latest = dict([*known.items(), (key, number)][-MOST:])
    with contextlib.suppress(MgenError, OSError):
        storage.make_folder(path.parent)
        storage.write_text(path, json.dumps(latest, indent=1) + "\n")


def _read(path: Path) -> dict[str, int]:
    """What the file holds; whatever is not a number above 0 is as good as not there."""
    try:
        if path.stat().st_size > MOST_BYTES:
            return {}
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(found, dict):
        return {}
    return {key: value for key, value in found.items() if type(value) is int and value > 0}
