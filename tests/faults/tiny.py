"""A run small enough to be made hundreds of times: several windows, batches, rows that fail."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import toy

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
VERSIONS = {"mgen": "of the tests"}


def make_small(patch: pytest.MonkeyPatch) -> None:
    """Windows of a few rows, so that a tiny run has several; a part for every batch."""
    settings = Job.settings
    patch.setattr(
        Job,
        "settings",
        lambda job, tokens: dataclasses.replace(settings(job, tokens), window_rows=WINDOW_ROWS),
    )
    patch.setattr("mgen_core.parts.PART_BYTES", 0)
    patch.setattr("mgen_core.record._versions", lambda: VERSIONS)  # slow to find


def start(
    data: Path, output: Path, catalog: Catalog, *, rows: Rows | None = None, **more: object
) -> Report:
    """What `mgen embed` does, in this process."""
    values = {"task": "embed", "backbone": "toy", "data": (str(data),), "batch_tokens": 20}
    config = make_config({**values, "output": output, **more})
    return run(config, catalog, Screen(), rows=rows)


def merged(run: Path, catalog: Catalog, **more: Any) -> Path:
    """What `mgen merge` does, in this process; where the file is, if it is one."""
    target = run.parent / f"{run.name}.parquet"
    merge(run, target, catalog, Selection(), **more)
    return target


def acknowledged(run: Path) -> list[Done]:
    """The parts that the done-logs say are done, whatever became of them."""
    return parts(lines(run)) if (run / "run.json").exists() else []


def lines(run: Path) -> list[str]:
    """The lines of all done-logs."""
    logs = sorted(run.glob("done/*"))
    return [line for log in logs for line in log.read_text(errors="replace").splitlines()]


def parts(lines: list[str]) -> list[Done]:
    """What the lines say; a torn one says nothing."""
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
    """What is on its way to become a file is hidden."""
    return sorted(path.name for path in folder.rglob(".*"))


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, but for the lock."""
    paths = (path for path in folder.rglob("*") if path.is_file() and path.name != "run.lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


# --------------------------------------------------------------------------- what is there before


class Source(NamedTuple):
    """A table, an undisturbed run over it and what it merges to; a run with other options."""

    data: Path
    run: Path
    merged: bytes
    other: Path


def make_source(folder: Path, catalog: Catalog) -> Source:
    data = toy.write_csv(folder / "in.csv", TEXTS)
    run, other = folder / "run", folder / "other"
    start(data, run, catalog)
    start(data, other, catalog, options={"pool": ["max"]})
    return Source(data, run, merged(run, catalog).read_bytes(), other)


def fresh(source: Source, run: Path) -> None:
    """Nothing is there yet."""


def half(source: Source, run: Path) -> None:
    """A run that was killed: half of its log, then a torn line; a part that no line names."""
    shutil.copytree(source.run, run)
    log = run / "done/rank-00000.jsonl"
    text = log.read_bytes()
    log.write_bytes(text[: len(text) // 2])
    part = next((run / "parts/rank-00000").iterdir())
    part.with_name(f".{part.name}.tmp").write_bytes(b"half of")


def another(source: Source, run: Path) -> None:
    """A run with other options, which --overwrite replaces."""
    shutil.copytree(source.other, run)
