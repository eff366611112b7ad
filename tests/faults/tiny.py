"""A run small enough to be made hundreds of times: several windows, batches, rows that fail."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path

import pytest

from mgen_core import Rows
from mgen_core.catalog import Catalog
from mgen_core.config import make_config
from mgen_core.job import Job
from mgen_core.manifest import Done, Manifest
from mgen_core.merge import Selection, merge
from mgen_core.run import Report, run
from mgen_core.screen import Screen

# A row is set aside while planning (!), one while computing (~); one is there twice.
TEXTS = ["ACD", "AC!D", "FFGH", "A~C", "GH" * 9, "ACD", "E" * 14, "CC", "HAC", "DEF" * 5]
WINDOW_ROWS = 4


def small_windows(patch: pytest.MonkeyPatch) -> None:
    """Windows of a few rows, so that a tiny run has several; a part for every batch."""
    settings = Job.settings
    patch.setattr(
        Job,
        "settings",
        lambda job, tokens: dataclasses.replace(settings(job, tokens), window_rows=WINDOW_ROWS),
    )
    patch.setattr("mgen_core.parts.PART_BYTES", 0)


def start(
    data: Path, output: Path, catalog: Catalog, *, rows: Rows | None = None, **more: object
) -> Report:
    """What `mgen embed` does, in this process."""
    values = {"task": "embed", "backbone": "toy", "data": (str(data),), "batch_tokens": 20}
    config = make_config({**values, "output": output, **more})
    return run(config, catalog, Screen(), rows=rows)


def merged(run: Path, catalog: Catalog) -> Path:
    """What `mgen merge` does, in this process; where the file is."""
    return merge(run, run.parent / f"{run.name}.parquet", catalog, Selection()).path


def acknowledged(run: Path) -> list[Done]:
    """The parts that the done-logs say are done, whatever became of them."""
    if not (run / "run.json").exists():
        return []
    lines = [
        line
        for log in sorted(run.glob("done/*"))
        for line in log.read_text(errors="replace").splitlines()
    ]
    found = []
    for line in lines:
        try:
            facts = json.loads(line)
        except ValueError:
            continue
        found.append(Done(**{**facts, "batches": tuple(facts["batches"])}))
    return found


def lost(run: Path, parts: list[Done]) -> list[Done]:
    """Those of the parts that are not what they were when they were acknowledged."""
    there = Manifest.open(run).done() if parts else []
    return [part for part in parts if part not in there or sha256(run / part.file) != part.sha256]


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def temporaries(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*.tmp"))
