"""Small runs whose directory is anywhere."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from mgen_core import place
from mgen_core.catalog import Catalog
from mgen_core.config import make_config
from mgen_core.manifest import Manifest
from mgen_core.merge import Selection, merge
from mgen_core.run import Report, run
from mgen_core.screen import Screen

SEQUENCES = [letter * length for length in range(1, 9) for letter in "ACDE"] + ["", "!"]


def table(folder: Path) -> Path:
    """A CSV of rows of which two are set aside."""
    path = folder / "data.csv"
    lines = [f"s{number},{text}" for number, text in enumerate(SEQUENCES)]
    path.write_text("\n".join(["id,sequence", *lines]) + "\n")
    return path


def go(data: str | Path, output: str | Path, catalog: Catalog, **settings: Any) -> Report:
    """Embed with the toy: in some batches."""
    values = {"task": "embed", "backbone": "toy", "batch_tokens": 30, **settings}
    config = make_config({**values, "data": str(data), "output": str(output)})
    return run(config, catalog, Screen())


def merged(run: str | Path, to: str | Path, catalog: Catalog) -> bytes:
    """The bytes of the merged file."""
    merge(place(str(run)), place(str(to)), catalog, Selection())
    return place(str(to)).read_bytes()


def acknowledged(run: str) -> dict[str, str]:
    """The done parts, each with its checksum, which is that of its bytes."""
    folder = place(run)
    if not (folder / "run.json").exists():
        return {}
    parts = {part.file: part.sha256 for part in Manifest.open(folder).done()}
    for file, sha256 in parts.items():
        assert hashlib.sha256((folder / file).read_bytes()).hexdigest() == sha256
    return parts


def logged(run: str) -> set[str]:
    """The files of all lines in the done-log."""
    lines = [
        json.loads(line)
        for log in (place(run) / "done").iterdir()
        for line in log.read_text().splitlines()
    ]
    return {line["file"] for line in lines}
