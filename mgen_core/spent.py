"""Runs whose parts were deleted after a merge: `merged.json` says where the rows are."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from . import storage
from .errors import RunError
from .manifest import MERGED, RECORD, Done, Manifest


def delete_parts(manifest: Manifest, done: Sequence[Done], files: Sequence[Path]) -> None:
    """Delete the parts; first of all it is written down which files hold their rows."""
    record = {"run": _identity(manifest), "files": [str(path.absolute()) for path in files]}
    storage.write_text(manifest.folder / MERGED, json.dumps(record, indent=1) + "\n")
    for part in done:
        storage.remove(manifest.folder / part.file)


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
    try:
        record = json.loads((manifest.folder / MERGED).read_text(encoding="utf-8"))
        return list(record["files"]) if record["run"] == _identity(manifest) else []
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError, KeyError) as error:
        path = manifest.folder / MERGED
        raise RunError(f"cannot read {path}: {error}", "restore or delete the file") from error


def _identity(manifest: Manifest) -> str:
    return hashlib.sha256((manifest.folder / RECORD).read_bytes()).hexdigest()
