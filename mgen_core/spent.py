"""Runs whose parts were deleted after a merge: `merged.json` says where the rows are."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from . import storage
from .errors import RunError
from .manifest import MERGED, RECORD, Done, Manifest


class Spent(NamedTuple):
    """What `merged.json` tells of the merge: the files it wrote, the rows in them."""

    files: list[str]
    rows: int
    failed: int


def delete_parts(
    manifest: Manifest, done: Sequence[Done], files: Sequence[Path], rows: int, failed: int
) -> None:
    """Delete the parts; first of all it is written down which files hold their rows."""
    record = {
        "run": _identity(manifest),
        "files": [str(path.absolute()) for path in files],
        "rows": rows,
        "failed": failed,
    }
    storage.write_text(manifest.folder / MERGED, json.dumps(record, indent=1) + "\n")
    for part in done:
        storage.remove(manifest.folder / part.file)


def finish(manifest: Manifest, files: Sequence[Path]) -> Spent | None:
    """Where a merge to these files was stopped while it deleted parts: delete what it has left."""
    found = _record(manifest)
    if found is None or found.files != [str(path.absolute()) for path in files]:
        return None
    done = manifest.done()
    if not manifest.missing(done) or not all(path.exists() for path in files):
        return None
    for part in done:
        storage.remove(manifest.folder / part.file)
    return found


def check(manifest: Manifest, missing: Sequence[int]) -> None:
    """Raise `RunError` where batches are missing because their parts were deleted after a merge."""
    files = merged_files(manifest) if missing else []
    if files:
        more = f" to {files[-1]}" if len(files) > 1 else ""
        raise RunError(
            f"the parts of {manifest.folder} were deleted after merging them to {files[0]}{more}",
            f"use that, or compute all again: {manifest.command()} --overwrite",
        )


def merged_files(manifest: Manifest) -> list[str]:
    """The files to which this very run was merged before its parts were deleted; else none."""
    found = _record(manifest)
    return found.files if found else []


def _record(manifest: Manifest) -> Spent | None:
    try:
        told = json.loads((manifest.folder / MERGED).read_text(encoding="utf-8"))
        found = Spent(list(map(str, told["files"])), int(told["rows"]), int(told["failed"]))
        return found if told["run"] == _identity(manifest) else None
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError) as error:
        path = manifest.folder / MERGED
        raise RunError(f"cannot read {path}: {error}", "restore or delete the file") from error


def _identity(manifest: Manifest) -> str:
    return hashlib.sha256((manifest.folder / RECORD).read_bytes()).hexdigest()
